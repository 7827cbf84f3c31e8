"""Workers of data loaders: they ignore the first signal, and end when training ends."""

import gc
import os
import signal
from functools import cache
from typing import Any

from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


@cache
def outlive_a_signal() -> None:
    """Let this worker ignore one signal, as a signal may reach all processes while the run saves; the next ends it."""

    def ignore(*_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ignore)


def end_workers() -> None:
    """End the workers of all data loaders, since each would delay Python's exit by five seconds."""
    for each in gc.get_objects():
        if type(each) is _MultiProcessingDataLoaderIter:
            each._shutdown_workers()  # type: ignore[attr-defined]
