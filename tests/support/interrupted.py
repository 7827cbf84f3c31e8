"""Runs that are interrupted at a step, and a comparison of their weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from cocoa_embed.train import pipeline


class Killed(BaseException):
    """Stands for the end of the process: the code under test must not catch it."""


class AtStep(TrainerCallback):
    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step = step
        self.act = act

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if args[1].global_step == self.step:
            self.act()


def die(*args: Any, **kwargs: Any) -> NoReturn:
    raise Killed


@contextmanager
def acting_at(step: int, act: Callable[[], object], stage: str = "") -> Iterator[None]:
    """Call ``act`` at the end of a step of the stage, by default of all stages."""
    show = pipeline.show_progress

    def show_and_act(built: Trainer, name: str, shown: dict[str, str]) -> None:
        show(built, name, shown)
        if name == stage or not stage:
            built.add_callback(AtStep(step, act))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "show_progress", show_and_act)
        yield


@contextmanager
def killed_at(step: int, stage: str = "") -> Iterator[None]:
    """Kill the run inside the block at the end of a step."""
    with acting_at(step, die, stage), pytest.raises(Killed):
        yield


def same_weights(first: Path, second: Path) -> bool:
    """Return whether two checkpoints have equal weights."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)
