"""The CPU cores of this process, and how OpenMP threads wait for each other."""

import os
import sys


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux knows a process's affinity
        return os.cpu_count() or 1


def use_passive_waiting() -> None:
    """Let OpenMP threads sleep while they wait for each other, unless the environment says otherwise.

    By default they spin. Beside another busy process a spinning thread takes a core from the thread that it waits for,
    and a training step takes several times as long. OpenMP reads the setting when torch loads it, so this function does
    nothing in a process that has imported torch.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
