"""The errors that people are meant to read: one sentence that says what, where, and what to do."""

from importlib import import_module
from pathlib import Path
from types import ModuleType


class CocoaError(Exception):
    """Something failed in a way the user can act on. The command line prints it alone and exits with 1."""

    exit_status = 1
    is_raised_by_all = False
    """Every process of a run raises it, so that the first can tell it for all."""


class UsageError(CocoaError):
    """The command or the recipe asks for something that cannot be. The command line exits with 2."""

    exit_status = 2


class MissingExtraError(CocoaError):
    """A package is not installed that an optional part of the project needs."""


class SourceError(CocoaError):
    """Something of the user's cannot be used. ``source`` says which one, ``reason`` why."""

    separator = ": "
    """What stands between the two in the message."""

    def __init__(self, source: str, reason: str) -> None:
        """Keep both parts and join them to the message."""
        super().__init__(f"{source}{self.separator}{reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Let the error cross from one process to another."""
        return type(self), (self.source, self.reason)


class ImageError(SourceError):
    """An image cannot be used."""


class RowError(SourceError):
    """A row cannot be used."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which the optional dependencies ``extra`` install.

    :raises MissingExtraError: If it is not installed; the message holds the pip command.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module.split('.')[0]} is not installed; run: pip install 'cocoa-embed[{extra}]'"
        ) from error


def one_line(error: BaseException) -> str:
    """Return an error's message on one printable line, or its name where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.isprintable() else ascii(text)[1:-1]


def printable(path: str | Path) -> str:
    """Return a path as it is shown to people: quoted and escaped only where it holds what cannot be printed."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
