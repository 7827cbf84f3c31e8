"""Files on this machine, or on any file system that fsspec knows."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from glob import has_magic
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TextIO, TypeAlias

from cocoa_embed.errors import CocoaError, one_line, printable, require
from cocoa_embed.images.urls import is_web

Place: TypeAlias = Path | str
"""A local file, or the address of a remote one (``s3://bucket/rows.csv``)."""

MTIME_NAMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What file systems call the time of the last change."""

ANSWER_SECONDS = 60
"""How long an http server may take to answer, or to send more."""


@contextmanager
def reading(place: Place) -> Iterator[None]:
    """Turn any exception into a ``CocoaError`` that names the file.

    :raises CocoaError: Instead of the exception.
    """
    try:
        yield
    except CocoaError:
        raise
    except Exception as error:  # remote file systems raise nearly anything
        raise CocoaError(f"{printable(place)} cannot be read ({one_line(error).rstrip('.')}).") from error


def open_binary(place: Place) -> BinaryIO:
    """Open a file."""
    if isinstance(place, Path):
        return place.open("rb")
    system, path = file_system(place)
    file: BinaryIO = system.open(path, "rb")
    return file


def open_text(place: Place, encoding: str, newline: str = "") -> TextIO:
    """Open a text file; its line ends stay as they are."""
    return TextIOWrapper(open_binary(place), encoding, newline=newline)


def suffix_of(place: Place) -> str:
    """Return the suffix of a file's name in lower case, ``.csv``."""
    return PurePosixPath(place).suffix.lower()


def remote_places(pattern: str) -> list[str]:
    """Return the remote file of this name, or the files that match a glob, sorted; none if there are none.

    :raises CocoaError: If the file system does not answer.
    """
    with reading(pattern):
        system, path = file_system(pattern)
        if has_magic(path):
            return [system.unstrip_protocol(name) for name in sorted(system.glob(path))]
        try:
            system.info(path)
        except FileNotFoundError as error:
            if error.__cause__ is not None:  # over http, any failure raises a FileNotFoundError
                raise error.__cause__ from None
            return []
        return [pattern]


def version_of(place: Place) -> tuple[str, ...]:
    """Return a file's name with values that change when it does: its size and mtime, or the file system's key for both.

    :raises CocoaError: If it cannot be read.
    """
    with reading(place):
        if isinstance(place, Path):
            found = os.stat(place)
            return str(place.absolute()), str(found.st_size), str(found.st_mtime_ns)
        system, path = file_system(place)
        # Over http, the file system's key depends on the address alone.
        return place, str(system.info(path)) if is_web(place) else system.ukey(path)


def modified_at(place: Place) -> float:
    """Return when a file was changed, in seconds since 1970; 0 if that is unknown."""
    try:
        if isinstance(place, Path):
            return os.stat(place).st_mtime
        system, path = file_system(place)
        return mtime_of(system.info(path))
    except Exception:  # noqa: BLE001 - reading the file reports what is wrong
        return 0.0


def is_gone(address: str) -> bool:
    """Return whether there is certainly no file at a remote address; False if its file system does not answer."""
    try:
        system, path = file_system(address)
        system.info(path)  # from the cached listing, if there is one
    except FileNotFoundError as error:
        return error.__cause__ is None  # over http, any failure raises a FileNotFoundError
    except Exception:  # noqa: BLE001 - it cannot be checked
        return False
    return False


def mtime_of(info: Mapping[str, Any]) -> float:
    """Return when a remote file was changed, in seconds since 1970, from what its file system lists; 0 if unknown."""
    found = next((info[name] for name in MTIME_NAMES if info.get(name)), 0.0)
    if isinstance(found, str):
        with suppress(ValueError):
            found = datetime.fromisoformat(found.replace("Z", "+00:00"))
    if isinstance(found, datetime):
        return found.timestamp()
    return float(found) if isinstance(found, int | float) else 0.0


def file_system(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it.

    :raises Exception: Anything that the file system raises.
    """
    system, path = require("fsspec", "tables").core.url_to_fs(address, **_options(address))
    return system, path


def _options(place: str) -> dict[str, Any]:
    """Return the options of a file system: over http, a timeout."""
    if not is_web(place):
        return {}
    timeout = require("aiohttp", "train").ClientTimeout(sock_connect=ANSWER_SECONDS, sock_read=ANSWER_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}
