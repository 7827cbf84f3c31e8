"""What all commands share: options, checks, and the output on standard output and standard error."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.errors import CocoaError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

DeviceOption = Annotated[str | None, typer.Option("--device", help="The torch device [default: the fastest].")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


@contextlib.contextmanager
def working() -> Iterator[Console]:
    """Keep standard output for the result: anything printed meanwhile goes to standard error."""
    from rich.console import Console

    with contextlib.redirect_stdout(sys.stderr):
        yield Console(stderr=True)


QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What libraries read when they are imported."""


def silence_libraries() -> None:
    """Turn off the progress bars, the warnings and the informal messages of other libraries; import none of them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if datasets := sys.modules.get("datasets"):
        datasets.disable_progress_bars()
    if sys.modules.get("transformers"):
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="PIL")  # broken files are reported by name
    for name in ("sentence_transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_all(*checks: Callable[[], Any]) -> list[Any]:
    """Run checks of a command's arguments, and return their results.

    :raises CocoaError: If checks fail: one error with the messages of all that failed.
    """
    results, errors = [], []
    for check in checks:
        try:
            results.append(check())
        except CocoaError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kind = UsageError if any(isinstance(error, UsageError) for error in errors) else CocoaError
        raise kind("\n".join(map(str, errors)))
    return results


def say(console: Console, line: str) -> None:
    """Print one line for people, unwrapped and without markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def say_passed_over(counts: dict[str, int], console: Console) -> None:
    """Print how many files and folders were passed over for which reason, if any were."""
    if counts:
        say(console, f"passed over: {', '.join(f'{number} {why}' for why, number in counts.items())}")


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on standard output, in ASCII, which any terminal's encoding can show."""
    typer.echo(json.dumps(document, indent=2))
