"""What all commands share: how options become arguments, checks, and the output."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TextIO

import typer

from cocoa_embed.errors import CocoaError, UsageError, printable

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
KEYWORD = inspect.Parameter.KEYWORD_ONLY


def as_command(function: Callable[..., dict[str, Any] | None]) -> Callable[..., None]:
    """Return a function that typer can register as a command.

    A parameter that is a dataclass of options becomes one option per field. If the function returns a document, the
    command has the option ``--json``, which prints it. The exit status is 1 if the document lists anything as
    ``failed``.
    """
    signature = inspect.signature(function, eval_str=True)
    parameters = signature.parameters
    classes = {name: each.annotation for name, each in parameters.items()}
    groups: dict[str, Any] = {name: each for name, each in classes.items() if dataclasses.is_dataclass(each)}
    members = {name: inspect.signature(group, eval_str=True).parameters for name, group in groups.items()}
    options = [option for name, each in parameters.items() for option in members.get(name, {name: each}).values()]
    if signature.return_annotation is not None:
        options.append(inspect.Parameter("as_json", KEYWORD, default=False, annotation=JsonOption))

    @functools.wraps(function)
    def run(as_json: bool = False, **values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{option: values.pop(option) for option in members[name]})
        document = function(**values) or {}
        if as_json and document:
            with printing() as standard_output:
                typer.echo(json.dumps(document, indent=2), standard_output)  # in ASCII, for any encoding
        if document.get("failed"):
            raise typer.Exit(1)

    vars(run)["__signature__"] = inspect.Signature([option.replace(kind=KEYWORD) for option in options])
    return run


@contextlib.contextmanager
def printing() -> Iterator[TextIO]:
    """Yield standard output, and flush it at the end.

    :raises CocoaError: If it cannot be written, for example because the disk is full.
    """
    standard_output = sys.stdout
    try:
        yield standard_output
        standard_output.flush()
    except BrokenPipeError:  # the reader has closed the pipe: typer exits quietly
        raise
    except OSError as error:
        raise CocoaError(f"standard output cannot be written ({error.strerror})") from error


def working() -> contextlib.AbstractContextManager[object]:
    """Reserve standard output for the result: anything printed meanwhile goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr)


QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment variables that libraries read when they are imported."""


def silence_libraries() -> None:
    """Turn off the progress bars, the warnings and the info messages of other libraries, without importing them."""
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


def say(line: str) -> None:
    """Print one line for people."""
    typer.echo(line, err=True)


def say_passed_over(counts: dict[str, int]) -> None:
    """Print how many files and folders were passed over for which reason, if any were."""
    if counts:
        say(f"passed over: {', '.join(f'{number} {why}' for why, number in counts.items())}")


def say_left_out(failed: Iterable[Mapping[str, str]], words: str = "left out") -> None:
    """Print the path of each image that could not be used, and the reason."""
    for failure in failed:
        say(f"{words}: {printable(failure['path'])}: {failure['reason']}")
