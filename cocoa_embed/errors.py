"""The errors that people are meant to read: one sentence that says what, where, and what to do."""

from importlib import import_module
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
