"""The cores of this machine, and how a model on the CPU shares them with the workers that prepare its inputs."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median

import torch

TIMES_KEPT = 5
BATCHES_TO_RECHECK = 64
CONSIDERABLE = 0.1
"""Preparing that takes this share of the model's time, by all cores, is worth doing beside it."""
CLEARLY_FASTER = 0.9
"""In turn is taken if it needs less than this share of the time: others on the machine disturb beside less."""
BATCHES_TO_TRY = 8
"""Beside is tried after so many batches even if it is not."""


def available_cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Linux alone knows
        return os.cpu_count() or 1


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads in operations that the calling thread starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start_workers(count: int, name: str) -> ThreadPoolExecutor:
    """Start threads of one torch thread each, and leave the share of all other threads as it is.

    More would do worse than crowd the cores: a worker that has OpenMP threads of its own makes those of the model sleep
    between operations instead of spin. ``torch.set_num_threads`` sets the calling thread's share and what threads born
    later begin with. So the workers are all started here and now, and then the latter is put back.
    """
    own_threads = torch.get_num_threads()
    all_here = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # takes over the common setting, which would else happen after the next line
        torch.set_num_threads(1)
        all_here.wait()

    executor = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=begin)
    try:
        for _ in range(count):
            executor.submit(int)
        all_here.wait()
    except BaseException:
        all_here.abort()
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(own_threads)
    return executor


class CoreShare:
    """Decides for every batch whether a model on the CPU runs in turn with the workers, or beside them.

    In turn: the workers have all cores while the model waits, then the model has all while they wait. Beside: the
    workers have some cores and the model the others, at the same time. A model of large operations gains from every
    core and is faster in turn. One of small operations does not, and is as fast beside; many times faster on a machine
    with other things to do, where the threads that share an operation wait for the last of them. So the model starts in
    turn, beside is tried soon, the faster is taken, and the other is tried again now and then.
    """

    def __init__(self, *, workers: int, cores: int, threads: int) -> None:
        """Share ``cores`` between ``workers`` and a model.

        :param threads: The torch threads that the model has by itself.
        """
        self.workers = workers
        self.cores = max(cores, workers)
        self.threads_beside = max(1, min(threads, cores - workers))
        self.threads_in_turn = threads
        self._alone: deque[float] = deque(maxlen=TIMES_KEPT)
        """Seconds of the model by itself for a unit of work."""
        self._beside: deque[float] = deque(maxlen=TIMES_KEPT)
        """Seconds of the model beside the workers for a unit of work, with those of waiting for them."""
        self._preparing: deque[float] = deque(maxlen=TIMES_KEPT)
        """Seconds of one core for a unit of work."""
        self._batches = 0
        self._was_in_turn = True

    @property
    def has_choice(self) -> bool:
        """Whether the model would have more threads in turn."""
        return self.threads_in_turn > self.threads_beside

    def is_in_turn(self, *, is_all_prepared: bool) -> bool:
        """Tell how the next batch is to run.

        :param is_all_prepared: There is nothing left to prepare beside the model.
        """
        if not self.has_choice:
            return False
        if not self._alone:
            return True
        alone, preparing = median(self._alone), median(self._preparing) / self.cores
        if not self._beside:
            return is_all_prepared or (preparing < CONSIDERABLE * alone and self._batches < BATCHES_TO_TRY)
        return alone + (0 if is_all_prepared else preparing) < CLEARLY_FASTER * median(self._beside)

    def threads(self, in_turn: bool) -> int:
        """Return the torch threads that the model may use."""
        return self.threads_in_turn if in_turn else self.threads_beside

    def note(self, in_turn: bool, *, work: int, model: float, waiting: float, preparing: float) -> None:
        """Keep what a batch took.

        :param work: Its visual tokens.
        :param model: The seconds of the forward pass.
        :param waiting: The seconds that the model waited for the batch.
        :param preparing: The seconds of one core that decoding and preprocessing took.
        """
        self._batches += 1
        if self._batches == 1:
            return  # the first pass allocates and compiles
        if self._batches % BATCHES_TO_RECHECK == 0:
            (self._beside if in_turn else self._alone).clear()
        self._preparing.append(preparing / work)
        if in_turn:
            self._alone.append(model / work)
        else:
            # The first beside was prepared in turn, or waited for because nothing was ready.
            self._beside.append((model + (0 if self._was_in_turn else waiting)) / work)
        self._was_in_turn = in_turn
