"""The speed and the memory of graphics cards, to estimate a run on a card that this machine does not have."""

from typing import NamedTuple

LAUNCH_SECONDS = 5e-6
"""The minimum time of a kernel."""

HOST_SECONDS = 28e-6
"""The time that the host takes to launch a kernel from Python, in steps that wait for the host and not for the card.

On one H200 three steps of small mini-batches took 27 to 33 microseconds a kernel (docs/experiments.md, section 12).
"""

MATRIX_SPEED, MEMORY_SPEED = 0.61, 0.78
"""The ratio of the data sheet's speed that large matrix products, and memory-bound kernels, reach."""


class Card(NamedTuple):
    """The data sheet of a card.

    :param bf16_tflops: TFLOP/s of dense matrix products in bfloat16.
    :param full_tflops: TFLOP/s of dense matrix products in float32.
    :param terabytes: Memory bandwidth in TB/s.
    :param memory: Memory in GB.
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
        """Bytes per second that memory-bound kernels move."""
        return self.terabytes * 1e12 * MEMORY_SPEED


CARDS = {
    "a100": Card(312, 19.5, 2.04, 80),
    "h100": Card(989, 67, 3.35, 80),
    "h200": Card(989, 67, 4.8, 141),
    "l4": Card(121, 30.3, 0.3, 24),
    "l40s": Card(362, 91.6, 0.864, 48),
    "rtx4090": Card(165, 82.6, 1.01, 24),
}
