"""Estimate the time of a run on a graphics card that is not here, from its FLOPs."""

from typing import NamedTuple


class Card(NamedTuple):
    """The data sheet of a card: dense matrix products in TFLOP/s, in bfloat16 and in float32."""

    bf16: float
    full: float


CARDS = {
    "a100": Card(312, 19.5),
    "h100": Card(989, 67),
    "h200": Card(989, 67),
    "l4": Card(121, 30.3),
    "l40s": Card(362, 91.6),
    "rtx4090": Card(165, 82.6),
}

UTILISATION = {"dora": 0.018, "lora": 0.028, "none": 0.18}
"""The ratio of a card's speed that training reached by kind of adapter, without recomputed activations.

Measured with Qwen2-VL-2B on one H200 (docs/experiments.md, section 10); other cards are assumed to reach the same.
"""


def seconds_on(card: str, flops: float, *, mixed_precision: str, adapter: str) -> float:
    """Return the seconds that so many FLOPs take on one card.

    :param adapter: A key of ``UTILISATION``.
    """
    speed = CARDS[card].bf16 if mixed_precision == "bf16" else CARDS[card].full
    return flops / (speed * 1e12 * UTILISATION[adapter])
