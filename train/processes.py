"""One process or many: what the first does for all, and who may speak."""

import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from cocoa_embed.errors import CocoaError, UsageError

Result = TypeVar("Result")

PATIENCE = timedelta(hours=3)
"""How long processes wait for the first one, which decodes every image before training."""


def is_first_process() -> bool:
    """Tell whether this is the only process of a run or the first of several, before they have met."""
    return os.environ.get("RANK", "0") == "0"


def hush_others() -> None:
    """Silence warnings and log lines of all processes but the first, and of torch's own code below Python in all."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it cannot go on in forked workers, and says so
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"accelerate|sentence_transformers|transformers")
    if not is_first_process():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)


def meet() -> PartialState:
    """Join the run's other processes, where a launcher has started any.

    :raises UsageError: If one process would have several accelerators to itself.
    """
    has_accelerator = torch.accelerator.is_available()
    # cpu=None leaves the choice of a device and of its backend to accelerate.
    state = PartialState(cpu=None if has_accelerator else True, timeout=PATIENCE)
    if state.num_processes == 1 and has_accelerator and torch.accelerator.device_count() > 1:
        raise UsageError(
            f"This machine has {torch.accelerator.device_count()} accelerators and one process was started; run "
            "`accelerate launch -m cocoa_embed.train RECIPE` to use all, or set CUDA_VISIBLE_DEVICES=0."
        )
    return state


def by_first_process(function: Callable[[], Result]) -> Result:
    """Call ``function`` in the first process and return what it returned in all of them.

    :raises CocoaError: In the first process, if the function does. The others exit without a word.
    """
    state = meet()
    if state.num_processes == 1:
        return function()
    answer: list[Result | CocoaError | None] = [None]
    if state.is_main_process:
        try:
            answer[0] = function()
        except CocoaError as error:
            answer[0] = error
    broadcast_object_list(answer)
    (result,) = answer
    if isinstance(result, CocoaError):
        if state.is_main_process:
            raise result
        raise SystemExit(result.exit_status)
    return result  # type: ignore[return-value]
