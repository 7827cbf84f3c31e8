"""The command line and the output that all benchmarks share."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the first line of a docstring as its description, and the option ``--json``."""
    parser = argparse.ArgumentParser(description=str(description).splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def report(result: dict[str, Any], show: Callable[[dict[str, Any]], None], *, as_json: bool) -> None:
    """Print a result as one JSON document, or in readable form with ``show``."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


def process_bytes(file: str, *names: str, process: int | str = "self") -> int:
    """Return the memory of a process: the sum of the lines of a file in its ``/proc`` that begin with ``names``."""
    lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))
