"""What all commands share: options, and what goes to standard output and what to standard error."""

from __future__ import annotations

import contextlib
import json
import logging
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
    """Keep standard output for the result: what anything prints meanwhile goes to standard error."""
    from rich.console import Console

    with contextlib.redirect_stdout(sys.stderr):
        yield Console(stderr=True)


def silence_libraries() -> None:
    """Turn off the loading bars, the warnings and the informal messages of other libraries."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="PIL")  # of broken files, which are reported by name
    for name in ("sentence_transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_all(*checks: Callable[[], Any]) -> list[Any]:
    """Run checks of what a user gave, and return their results.

    :raises CocoaError: If checks fail: one error with the messages of all of them.
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
    """Print one line for people as it is."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on standard output, in ASCII, so that no terminal's encoding can spoil it."""
    typer.echo(json.dumps(document, indent=2))
