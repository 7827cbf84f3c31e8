"""One process or many: the first process works and reports for all."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from cocoa_embed.errors import CocoaError, UsageError

try:
    from torch.distributed import set_timeout
except ImportError:  # torch before 2.15
    from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

Result = TypeVar("Result")

PATIENCE = timedelta(hours=3)
"""The longest wait for the first process, which reads the rows and checks their images before training."""

TRAINING_PATIENCE = timedelta(minutes=15)
"""The longest wait during training, for another process's part of a step or for the first one to write a checkpoint."""


def silence_nonzero_ranks() -> None:
    """Silence warnings and log lines of all processes but the first, and torch's C++ log in all."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # does not work in forked workers
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"accelerate|sentence_transformers|transformers")
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)


def meet() -> PartialState:
    """Join the run's other processes, if a launcher has started any."""
    # cpu=None lets accelerate choose the device and its backend
    on_cpu: Any = None if torch.accelerator.is_available() else True
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


@contextmanager
def training_patience() -> Iterator[None]:
    """Give up on the other processes after ``TRAINING_PATIENCE`` inside the block, as one of them may have died."""
    state = meet()
    if state.num_processes == 1:
        yield
        return
    state.wait_for_everyone()
    set_timeout(TRAINING_PATIENCE)
    try:
        yield
    finally:
        set_timeout(PATIENCE)


@contextmanager
def taking_turns() -> Iterator[None]:
    """Let the processes of one machine run the block one after the other; they must not exchange anything in it."""
    state = meet()
    turn = state.local_process_index
    turns = 1 + max(gather_object([turn]))
    for _ in range(turn):
        state.wait_for_everyone()
    yield
    for _ in range(turns - turn):
        state.wait_for_everyone()


def refuse_idle_accelerators() -> None:
    """Check that each accelerator has a process.

    :raises UsageError: If one process has several accelerators.
    """
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if meet().num_processes == 1 and count > 1:
        raise UsageError(
            f"This machine has {count} accelerators, but only one process was started; run "
            "`accelerate launch -m cocoa_embed.train RECIPE` to use all of them, or set CUDA_VISIBLE_DEVICES=0 to use "
            "one."
        )


def by_first_process(function: Callable[[], Result]) -> Result:
    """Call ``function`` in the first process and return its result in all of them.

    :raises CocoaError: In the first process, if the function does; the others exit silently.
    """
    state = meet()
    if state.num_processes == 1:
        return function()
    answer: list[tuple[int, Result | None]] = [(0, None)]
    if state.is_main_process:
        try:
            answer = [(0, function())]
        except CocoaError as error:
            broadcast_object_list([(error.exit_status, None)])
            raise
    broadcast_object_list(answer)
    status, result = answer[0]
    if status:
        raise SystemExit(status)
    return cast(Result, result)
