"""Choose how much a device runs at once by trying it: a forward and backward pass of the worst case of each kind."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.train.loop.oom import is_out_of_memory
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.settings import Auto

RESERVE = 2 * 2**30
"""Bytes that stay free in a trial: batches of other shapes fragment memory."""

ADAM_BYTES = 8
"""Bytes of a trained parameter's moments, which the optimizer does not have yet in a trial."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A quantity of which a device may run more or less at once.

    :param name: What the sizes count, as words that follow a number: "tokens of texts".
    :param sizes: The sizes to choose from, largest first.
    :param run: Runs the forward passes of the largest batches of a size, and yields their losses one by one (scalars).
    :param use: Makes the trainer use a size.
    :param enough: Smaller sizes leave a device idle between its kernels: recomputing activations to run more at once
        is then faster than keeping them.
    """

    name: str
    sizes: Sequence[int]
    run: Callable[[int], Iterable[Tensor]]
    use: Callable[[int], None]
    enough: int = 0


def fit_to_memory(trainer: CocoaTrainer, trials: Sequence[Trial], recompute: bool | Auto) -> None:
    """Use the largest sizes that fit on every device, and log them in one line, if there is a choice.

    Every process calls this before training. It has no effect on weights, gradients, optimizer and random draws. If
    even the smallest size does not fit, it is used, and the first step fails with an error that says what to change.

    :param recompute: Whether to recompute activations (gradient checkpointing); ``auto``: if they do not fit otherwise.
    """
    if recompute == "auto":
        recompute_activations(trainer.model, on=False)
        fitting = _largest(trainer, trials, is_patient=False)
        if recompute := None in fitting:
            recompute_activations(trainer.model, on=True)
            fitting = _largest(trainer, trials, is_patient=True)
    else:
        trials = [trial for trial in trials if len(trial.sizes) > 1]
        fitting = _largest(trainer, trials, is_patient=True)
    sizes = [size or trial.sizes[-1] for size, trial in zip(fitting, trials, strict=True)]
    for size, trial in zip(sizes, trials, strict=True):
        trial.use(size)
    if trials:
        listed = " and ".join(f"{size} {trial.name}" for size, trial in zip(sizes, trials, strict=True))
        logger.warning("chosen by memory: %s at once, gradient checkpointing %s", listed, "on" if recompute else "off")


def _largest(trainer: CocoaTrainer, trials: Sequence[Trial], *, is_patient: bool) -> list[int | None]:
    """Return the largest size of each trial that fits; None where none does.

    :param is_patient: Also try sizes below ``enough``.
    """
    model: Any = trainer.model
    was_training, device = model.training, trainer.accelerator.device
    fork: Any = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    model.train()
    with torch.random.fork_rng(**fork):
        least = [0 if is_patient else min(trial.enough, trial.sizes[0]) for trial in trials]
        sizes = [
            next((size for size in trial.sizes if size >= least[place] and _fits(trainer, trial, size)), None)
            for place, trial in enumerate(trials)
        ]
    model.train(was_training)
    return sizes


def recompute_activations(module: Any, *, on: bool) -> None:  # noqa: ANN401
    """Turn gradient checkpointing on or off in a backbone, or in the backbone inside a stage's model."""
    model = next(each for each in module.modules() if isinstance(each, PreTrainedModel))
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def _fits(trainer: CocoaTrainer, trial: Trial, size: int) -> bool:
    """Return whether a size fits on every device."""
    model: Any = trainer.model
    try:
        trainer.compiled_if_possible(partial(_run, trainer, trial, size))
        fits = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    model.zero_grad(set_to_none=True)
    clear_device_cache()
    seen: Any = trainer.accelerator.gather(torch.tensor([fits], device=trainer.accelerator.device))
    return bool(seen.all())


def _run(trainer: CocoaTrainer, trial: Trial, size: int) -> None:
    """Run a size while holding the memory that training needs in addition to a pass."""
    device, model = trainer.accelerator.device, cast(nn.Module, trainer.model)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    taken = 0 if device.type == "cpu" else RESERVE + trained * ADAM_BYTES
    held = torch.empty(taken, dtype=torch.uint8, device=device)
    for loss in trial.run(size):
        loss.backward()
    del held
