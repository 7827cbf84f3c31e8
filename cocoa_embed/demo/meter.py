"""The wall-clock seconds and peak memory of each part of the demo."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console


@dataclass
class Meter:
    """Wall-clock seconds of each part, and the process's peak memory in bytes at the end of each."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, console: Console) -> Iterator[None]:
        """Announce and measure a part."""
        console.print(f"[bold]{name}[/bold]")
        started = time.perf_counter()
        yield
        self.record(name, time.perf_counter() - started)

    def record(self, name: str, seconds: float) -> None:
        """Record the seconds and the peak memory of a part that has just ended."""
        self.seconds[name] = round(seconds, 2)
        self.peak_memory_bytes[name] = peak_memory_bytes()


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
