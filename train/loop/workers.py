"""Workers of data loaders: they ignore a first signal, and end with the training."""

import gc
import os
import signal
from functools import cache
from typing import Any

from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


@cache
def outlive_a_signal() -> None:
    """Let this worker ignore one signal, which may go to all processes of a run while it saves; the next ends it."""

    def ignore(*_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ignore)


def end_workers() -> None:
    """End the workers of all data loaders: at Python's exit each would take five seconds."""
    for each in gc.get_objects():
        if type(each) is _MultiProcessingDataLoaderIter:
            each._shutdown_workers()  # type: ignore[attr-defined]
