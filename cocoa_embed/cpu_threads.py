"""The CPU cores of this process, and how OpenMP threads wait for each other."""

import os
import sys

SPIN_COUNT = "1000"
"""How often a waiting thread spins: for about 20 microseconds, which span the gap between two operations of a model.
Without any spinning, a step of the demo takes 1.7 times as long on a quiet machine
(``benchmarks/cpu_neighbours.py``)."""


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux knows a process's affinity
        return os.cpu_count() or 1


def limit_spinning() -> None:
    """Let OpenMP threads that wait for each other sleep soon, unless the environment sets how they wait.

    By default torch's OpenMP (libgomp) spins for milliseconds. If other processes are busy, a spinning thread takes a
    core from the thread that it waits for, and a training step takes several times as long. libgomp reads the setting
    when torch loads it, so this function does nothing in a process that has imported torch.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
