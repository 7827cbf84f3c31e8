"""Errors for people to read: one sentence that says what failed, where, and what to do."""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import TypeVar
from urllib.parse import unquote, urlsplit

Element = TypeVar("Element")


class CocoaError(Exception):
    """An error that the user can fix. The command line prints only the message and exits with status 1."""

    exit_status = 1
    is_raised_by_all = False
    """Whether every process of a run raises it; then only the first process prints it."""


class UsageError(CocoaError):
    """A command or a recipe asks for something impossible. The command line exits with status 2."""

    exit_status = 2


class MissingExtraError(CocoaError):
    """A package of an optional extra is not installed."""


class SourceError(CocoaError):
    """A file, row or image of the user's cannot be used: ``source`` names it, ``reason`` says why."""

    def __init__(self, source: str, reason: str) -> None:
        """Build the message from the source and the reason."""
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Pickle the source and the reason, so that the error can be passed between processes."""
        return type(self), (self.source, self.reason)


class ImageError(SourceError):
    """An image cannot be used."""


class TransientImageError(ImageError):
    """An image could not be used for a reason that may pass: a lack of memory, a package that is not installed."""


class RowError(SourceError):
    """A row cannot be used."""


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional extra.

    :raises MissingExtraError: If it is not installed; the message holds the pip command.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(f"{module.split('.')[0]} is not installed; run: {install_command(extra)}") from error


def install_command(extra: str) -> str:
    """Return the pip command that installs an extra, from the source that the project was installed from."""
    try:
        origin = json.loads(distribution("cocoa-embed").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    url = urlsplit(origin.get("url", ""))
    if "vcs_info" in origin:
        return f"pip install 'cocoa-embed[{extra}] @ {origin['vcs_info']['vcs']}+{origin['url']}'"
    if url.scheme != "file":
        return f"pip install 'cocoa-embed[{extra}]'"
    place = Path(unquote(url.path))
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"pip install {editable}'{'.' if place == Path.cwd() else place}[{extra}]'"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return, in parentheses, the known name closest to an unknown one, and all known names."""
    by_lower_case = {each.lower(): each for each in known}
    closest = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    guess = f"did you mean {by_lower_case[closest[0]]!r}? " if closest else ""
    return f"({guess}known: {', '.join(known) or 'none'})"


def one_line(error: BaseException) -> str:
    """Return an error's message on one printable line, or its class name if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.isprintable() else ascii(text)[1:-1]


def until_error(elements: Iterable[Element], errors: list[Exception]) -> Iterator[Element]:
    """Yield elements up to the first error, and append it to ``errors``; the caller raises it after these elements."""
    try:
        yield from elements
    except Exception as error:  # noqa: BLE001 - file systems and decoders raise nearly anything
        errors.append(error)


def is_valid_unicode(text: str) -> bool:
    """Return whether UTF-8 can encode a text: Python keeps undecodable bytes of a command line as lone surrogates."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def printable(path: str | Path) -> str:
    """Return a path for messages, escaped only if it holds unprintable characters."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
