"""Images on any file system that fsspec knows (``s3://``, ``gs://``, ``hf://``...), and on allowed hosts of the web."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from cocoa_embed.data.image_folder import METADATA_FILES
from cocoa_embed.data.places import file_system, is_gone, mtime_of, open_binary, reading
from cocoa_embed.errors import CocoaError, ImageError, one_line, printable
from cocoa_embed.images.find_files import is_image_name
from cocoa_embed.images.http import Fetcher
from cocoa_embed.images.load import check_size
from cocoa_embed.images.passed_over import PassedOver
from cocoa_embed.images.urls import is_web
from cocoa_embed.sources.base import Record, Shard, is_below, relative_key
from cocoa_embed.sources.files import files_of
from cocoa_embed.sources.shard_files import json_values
from cocoa_embed.sources.tables import table_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteImages:
    """A source: the images below an address, or some of them."""

    root: str
    """Empty if the images were named."""
    passed_over: PassedOver
    """Decides what is passed over below the address."""
    files: dict[str, dict[str, Any]] | None = None
    """The images that were named, with what is known about them; None for all below the address."""
    allowed_hosts: tuple[str, ...] = ()
    """The hosts from which web addresses may be fetched."""
    on_error: Callable[[str, str], object] = lambda source, reason: None
    """Called with a file of metadata that cannot be read, and the reason."""

    def shards(self) -> Iterator[Shard]:
        """Yield the folders that hold images, each listed when its turn comes."""
        folders = walk(self.root, self.passed_over) if self.files is None else [(self.name, self.files)]
        described: dict[str, tuple[dict[str, Any], str]] = {}
        checked: set[str] = set()
        for folder, files in folders:
            checked = {source for source in checked if is_below(f"{folder}/", source.rpartition("/")[0])}
            for source in (f"{folder}/{name}" for name in METADATA_FILES if f"{folder}/{name}" in files):
                rows, is_whole = descriptions(folder, source, self.on_error)
                described |= {address: (row, source) for address, row in rows.items()}
                checked |= {source} if is_whole else set()
            images = {address: info for address, info in files.items() if self.files or self._is_found(address)}
            if images:
                yield Shard(folder, partial(self._records, images, described, frozenset(checked)))

    def _records(
        self,
        files: dict[str, dict[str, Any]],
        described: Mapping[str, tuple[dict[str, Any], str]],
        checked: frozenset[str],
    ) -> Iterator[Record]:
        """Yield images, by address, with their metadata; each is downloaded when it is read."""
        for address, info in sorted(files.items()):
            size = info.get("size")
            metadata, source = described.get(address, ({}, None))
            yield Record(
                key=address,
                relative_key=relative_key(address, self.root or None),
                read=partial(read_address, address, self.allowed_hosts),
                mtime=mtime_of(info),
                size=size if isinstance(size, int) else None,
                metadata=metadata,
                metadata_source=source,
                checked_sources=checked,
            )

    def _is_found(self, address: str) -> bool:
        return is_image_name(address) and not self.passed_over.has_file(address, self.root, remote_start)

    @property
    def name(self) -> str:
        """The address, or that of the first image."""
        return self.root or next(iter(self.files or ()), "")

    def is_deleted(self, key: str) -> bool:
        """Return whether there is certainly no image at an address any more; False on the web."""
        return not is_web(key) and all(map(is_gone, [key, *files_of(key)]))

    def covers(self, key: str) -> bool:
        """Return whether the key is below the address.

        An image inside a file counts only if nothing is left at the address.
        """
        is_inside = self.root != "" and (key == self.root or is_below(key, self.root))
        return key in (self.files or ()) or (is_inside and ("#" not in key or self.files == {}))


def remote_start(address: str) -> bytes:
    """Return the first bytes of a file, none if they cannot be read."""
    with suppress(Exception), open_binary(address) as file:  # reading all of it reports what is wrong
        return file.read(4)
    return b""


def descriptions(
    folder: str, source: str, on_error: Callable[[str, str], object]
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Return what the metadata file of a folder says about images, by their addresses; and whether all rows are used.

    :param source: The address of the file.
    :param on_error: Called with it, if it cannot be read, and the reason.
    """
    found: dict[str, dict[str, Any]] = {}
    is_whole = True
    try:
        with reading(source):
            for number, row in table_rows(source):
                if name := row.pop("file_name", None):
                    found[f"{folder}/{name}"] = json_values(row)
                else:
                    is_whole = False
                    logger.warning("%s#%s has no file_name, and describes no image", printable(source), number)
    except CocoaError as error:
        is_whole = False
        on_error(source, str(error))
    return found, is_whole


def walk(root: str, passed_over: PassedOver) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Yield the address of each folder below an address, and what is known about its files, by their addresses.

    :param passed_over: Decides which folders are passed over.
    :raises ImageError: If the file system does not answer.
    """
    try:
        system, path = file_system(root)
        for folder, folders, files in system.walk(path, detail=True):
            address = system.unstrip_protocol(folder)
            is_cache = passed_over.has_cache(address, files, is_named=address.rstrip("/") == root)
            left = {} if is_cache else folders
            in_order = [each for each in sorted(left.items()) if not passed_over.has_folder(address, each[0], root)]
            folders.clear()
            folders.update(in_order)  # the walk continues with these
            there = {system.unstrip_protocol(info["name"]): info for info in files.values() if info["type"] == "file"}
            yield address, {} if is_cache else there
    except ImageError:
        raise
    except Exception as error:  # remote file systems raise nearly anything
        raise ImageError(printable(root), f"cannot be listed ({one_line(error)})") from error


@lru_cache(maxsize=4)
def _fetcher(allowed_hosts: tuple[str, ...]) -> Fetcher:
    return Fetcher(allowed_hosts)


def require_plain(address: str) -> None:
    """Refuse a chained address that is not on the web: ``fsspec`` would follow it to any host of the web.

    :raises ImageError: If it is one.
    """
    if "::" in address and not is_web(address):
        raise ImageError(printable(address), "is an address inside another one; give a plain address")


def read_address(address: str, allowed_hosts: tuple[str, ...]) -> bytes:
    """Return the bytes of an image on the web or on a remote file system.

    :raises ImageError: If it cannot be read, or is too large.
    """
    require_plain(address)
    if is_web(address):
        return _fetcher(allowed_hosts).fetch(address)
    try:
        system, path = file_system(address)
        check_size(system.info(path)["size"] or 1, address)
        with open_binary(address) as file:
            return file.read()
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(printable(address), "does not exist") from None
    except Exception as error:  # remote file systems raise nearly anything
        raise ImageError(printable(address), f"cannot be read ({one_line(error)})") from error
