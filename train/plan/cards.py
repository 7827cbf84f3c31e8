"""The speed and the memory of graphics cards, to estimate a run on one that is not here."""

from typing import NamedTuple

LAUNCH_SECONDS = 5e-6
"""The least time of a kernel."""

MATRIX_SPEED, MEMORY_SPEED = 0.61, 0.78
"""The ratio of the data sheet that large matrix products, and kernels bound by memory, reach."""


class Card(NamedTuple):
    """The data sheet of a card.

    :param bf16_tflops: Dense matrix products in bfloat16.
    :param full_tflops: In float32.
    :param terabytes: Of memory moved in a second.
    :param memory: In GB.
    """

    bf16_tflops: float
    full_tflops: float
    terabytes: float
    memory: int

    @property
    def bf16(self) -> float:
        """FLOP/s of a large matrix product in bfloat16."""
        return self.bf16_tflops * 1e12 * MATRIX_SPEED

    @property
    def full(self) -> float:
        """FLOP/s of a large matrix product in float32."""
        return self.full_tflops * 1e12 * MATRIX_SPEED

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.terabytes * 1e12 * MEMORY_SPEED

    @property
    def launch_seconds(self) -> float:
        """The least time of a kernel."""
        return LAUNCH_SECONDS


CARDS = {
    "a100": Card(312, 19.5, 2.04, 80),
    "h100": Card(989, 67, 3.35, 80),
    "h200": Card(989, 67, 4.8, 141),
    "l4": Card(121, 30.3, 0.3, 24),
    "l40s": Card(362, 91.6, 0.864, 48),
    "rtx4090": Card(165, 82.6, 1.01, 24),
}

UTILISATION = {"dora": 0.018, "lora": 0.028, "none": 0.18}
"""The ratio of a card's speed that training reached by kind of adapter, without recomputed activations.

Measured with Qwen2-VL-2B on one H200 (docs/experiments.md, section 10); other cards are assumed to reach the same.
"""


def seconds_on(card: str, flops: float, *, mixed_precision: str, adapter: str) -> float:
    """Return the seconds that so many FLOPs take on one card.

    :param adapter: A key of ``UTILISATION``.
    """
    speed = CARDS[card].bf16_tflops if mixed_precision == "bf16" else CARDS[card].full_tflops
    return flops / (speed * 1e12 * UTILISATION[adapter])
