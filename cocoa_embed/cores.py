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

WARM_UP = 1
"""Batches whose time is not counted: the first forward pass allocates and compiles."""
TIMES_KEPT = 5
BATCHES_TO_RECHECK = 32


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
        torch.get_num_threads()  # a thread takes over the common setting when it is first asked; not after it has its own
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
    """Decides for every batch whether a model on the CPU runs beside the workers, or in turn with them.

    Beside: the workers have some cores and the model the others, at the same time. In turn: the workers have all cores
    while the model waits, then the model has all while the workers wait. A model of large operations gains from every
    core, and is faster in turn; one of small operations does not, and is faster beside. So both ways are timed on the
    first batches, the better is taken, and the other is tried again now and then.
    """

    def __init__(self, *, workers: int, cores: int, threads: int) -> None:
        """Share ``cores`` between ``workers`` and a model.

        :param threads: The torch threads that the model may have at most.
        """
        self.workers = workers
        self.cores = max(cores, workers)
        self.threads_beside = max(1, min(threads, cores - workers))
        self.threads_in_turn = threads
        self._model_times: dict[bool, deque[float]] = {way: deque(maxlen=TIMES_KEPT) for way in (False, True)}
        self._preparation_times: deque[float] = deque(maxlen=TIMES_KEPT)
        self._batches = 0

    @property
    def has_choice(self) -> bool:
        """Whether the model would have more threads in turn."""
        return self.threads_in_turn > self.threads_beside

    def is_in_turn(self) -> bool:
        """Tell how the next batch is to run."""
        if not self.has_choice:
            return False
        if self._batches <= WARM_UP or not self._model_times[True]:
            return True
        if not self._model_times[False]:
            return False
        return self._is_faster_in_turn() != (self._batches % BATCHES_TO_RECHECK == 0)

    def threads(self, in_turn: bool) -> int:
        """Return the torch threads that the model may use."""
        return self.threads_in_turn if in_turn else self.threads_beside

    def note(self, in_turn: bool, *, work: int, model_seconds: float, preparation_seconds: float) -> None:
        """Keep what a batch took.

        :param work: Its visual tokens.
        :param model_seconds: The time of the forward pass.
        :param preparation_seconds: The time of one core that decoding and preprocessing took.
        """
        self._batches += 1
        if self._batches > WARM_UP:
            self._model_times[in_turn].append(model_seconds / work)
            self._preparation_times.append(preparation_seconds / work)

    def _is_faster_in_turn(self) -> bool:
        preparation = median(self._preparation_times)
        beside, in_turn = (median(self._model_times[way]) for way in (False, True))
        return in_turn + preparation / self.cores < max(beside, preparation / self.workers)
