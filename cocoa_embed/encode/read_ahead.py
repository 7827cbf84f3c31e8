"""Apply a function to inputs in threads, a bounded number ahead of the consumer, in the order of the inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")

READERS = 8
"""Threads that read files. More than cores: they mostly wait for disks and networks."""


def read_ahead(
    function: Callable[[Input], Output], inputs: Iterable[Input], *, workers: int = READERS, ahead: int | None = None
) -> Generator[tuple[Input, Future[Output]]]:
    """Yield each input with the future of ``function(input)``, in order, while later inputs are processed in threads.

    The calling thread takes the inputs, lazily. ``result()`` of a future waits, and raises the function's error for
    that input. Closing the generator cancels calls that have not begun and waits for the others.

    :param workers: The number of threads.
    :param ahead: The inputs that are taken beyond the yielded one; twice the workers by default.
    """
    ahead = 2 * workers if ahead is None else ahead
    waiting: deque[tuple[Input, Future[Output]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cocoa-read-ahead")
    try:
        for each in inputs:
            waiting.append((each, pool.submit(function, each)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
