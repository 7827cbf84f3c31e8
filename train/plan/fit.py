"""Choose by the meter how much a card runs at once where a recipe says ``auto``; ``memory_trial`` does so by trying."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import PartialState

from cocoa_embed.train.loop.memory_trial import RESERVE
from cocoa_embed.train.plan.cards import CARDS
from cocoa_embed.train.plan.cost import BatchShape
from cocoa_embed.train.plan.meter import StageMeter
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.stage import Stage

GB = 1e9


@dataclass(frozen=True)
class AtOnce:
    """How much a device runs at once.

    :param recomputes: Whether activations are recomputed (gradient checkpointing).
    :param sizes: The size that was chosen for each kind of sequence (``Stage.kind_at_once``); empty where memory does
        not decide.
    """

    recomputes: bool
    sizes: dict[str, int] = field(default_factory=dict)

    def sequences(self, stage: Stage[StageSettings], devices: int, shape: BatchShape) -> int:
        """Return how many sequences of a shape run at once."""
        size = self.sizes.get(stage.kind_at_once(with_image=shape.patches > 0))
        return stage.sequences_at_once(devices, shape.tokens, size)


def memory_of(card: str | None) -> float | None:
    """Return the memory of a card, or of this machine's, in bytes; None on a CPU, where it limits no mini-batch."""
    if card is not None:
        return CARDS[card].memory * GB
    device = torch.device(str(PartialState().device))
    return float(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None


def fit_to_card(
    stage: Stage[StageSettings], meter: StageMeter, shapes: Sequence[BatchShape], devices: int, memory: float | None
) -> AtOnce:
    """Return what ``fit_to_memory`` would choose, and set the meter's gradient checkpointing to it.

    :param shapes: The shapes of the sequences of the meter's rows, in the same order.
    :param memory: The memory in bytes; None on a CPU.
    """
    sizes, asked = sorted(stage.sizes_at_once(devices)), stage.run.gradient_checkpointing
    if memory is None or stage.run.sharding != "none":
        at_once = AtOnce(asked is True or (asked == "auto" and memory is not None))
        meter.recompute_activations(on=at_once.recomputes)
        return at_once
    room = memory - RESERVE - sum(meter.state_bytes().values())
    kinds = [stage.kind_at_once(with_image=shape.patches > 0) for shape in shapes]
    longest_first = sorted(range(len(shapes)), key=lambda place: (-shapes[place].tokens, -place))
    worst = {kind: next(place for place in longest_first if kinds[place] == kind) for kind in kinds}

    def largest(place: int) -> int | None:
        def peak(size: int) -> float:
            return meter.mini_batch(place, stage.sequences_at_once(devices, shapes[place].tokens, size)).peak_bytes

        fitting = bisect_right(sizes, room, key=peak)
        return sizes[fitting - 1] if fitting else None

    recomputes, found = False, dict[str, int | None]()
    for recomputes in [False, True] if asked == "auto" else [asked]:
        meter.recompute_activations(on=recomputes)
        if len(sizes) == 1 and asked != "auto":
            return AtOnce(recomputes)
        found = {kind: largest(place) for kind, place in worst.items()}
        least = min(stage.enough_at_once, sizes[-1])
        if recomputes or asked is False or all(size is not None and size >= least for size in found.values()):
            break
    return AtOnce(recomputes, {kind: size or sizes[0] for kind, size in found.items()})
