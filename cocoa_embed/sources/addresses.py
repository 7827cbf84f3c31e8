"""Images on the web: one address, a list of them, or a table with a column of them; fetched from allowed hosts only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlsplit

from cocoa_embed.data.places import Place, open_text, suffix_of
from cocoa_embed.data.tables import open_table
from cocoa_embed.errors import ImageError, RowError, UsageError, one_line
from cocoa_embed.images.http import Fetcher
from cocoa_embed.images.urls import shown_address
from cocoa_embed.sources import tables
from cocoa_embed.sources.base import Record, Shard, SourceOptions
from cocoa_embed.sources.remote import download
from cocoa_embed.sources.shard_files import Kind, ShardFile, json_values, shard_error
from cocoa_embed.sources.tables import ADDRESS_COLUMNS, address_column, batches

SCHEMES = ("http://", "https://")


def is_address(text: object) -> bool:
    """Return whether a value is an http or https address."""
    return isinstance(text, str) and text[:8].lower().startswith(SCHEMES)


def read_addresses(file: ShardFile) -> Iterator[Record]:
    """Yield the images of a list, an address a line, or of a table with a column of addresses.

    :raises ImageError: If the file cannot be read.
    """
    count = 0
    try:
        for number, row in _table(file.place):
            column = address_column(row)
            address = "" if column is None else str(row[column]).strip()
            others = {key: value for key, value in row.items() if key != column}
            if "://" in address:
                yield address_record(address, file.options, file.key, others)
            else:
                reason = f"has {address!a} instead of an address" if column else f"has no column {ADDRESS_COLUMNS[0]!r}"
                yield file.make_record(number, ImageError(f"{file.key}#{number}", reason), others)
            count += 1
    except Exception as error:  # remote file systems raise nearly anything
        raise shard_error(file, count, one_line(error)) from error


def _table(place: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a list or a table, each with its number: lines count from 1, rows from 0."""
    suffix = suffix_of(place)
    if suffix == ".txt":
        with open_text(place, "utf-8-sig") as file:
            lines = ((str(number), line.strip()) for number, line in enumerate(file, 1))
            yield from ((number, {"url": line}) for number, line in lines if line and not line.startswith("#"))
        return
    if suffix in tables.KIND.suffixes:
        rows: Iterator[Any] = (row for batch in batches(place) for row in batch.to_pylist())
    else:
        table = open_table(place)
        rows = (row for _, row in table.read(table.columns))
    yield from ((str(number), {} if isinstance(row, RowError) else row) for number, row in enumerate(rows))


def address_record(
    address: str, options: SourceOptions, source: str | None = None, metadata: Mapping[str, Any] | None = None
) -> Record:
    """Return the record of one address; it is fetched when the record is read.

    :param source: The list or table that has it.
    """
    parts = urlsplit(address)
    return Record(
        key=address,
        relative_key=f"{parts.netloc}{parts.path}",
        read=partial(_fetch, address, options.allowed_hosts) if is_address(address) else partial(download, address),
        metadata=json_values(metadata or {}),
        metadata_source=source if metadata else None,
    )


@lru_cache(maxsize=4)
def _fetcher(allowed_hosts: tuple[str, ...]) -> Fetcher:
    return Fetcher(allowed_hosts)


def _fetch(address: str, allowed_hosts: tuple[str, ...]) -> bytes:
    return _fetcher(allowed_hosts).fetch(address)


@dataclass(frozen=True)
class OneAddress:
    """A source, and a shard: the image at one address."""

    key: str
    options: SourceOptions
    version: str = ""

    def shards(self) -> Iterator[Shard]:
        """Yield the address."""
        yield self

    def records(self) -> Iterator[Record]:
        """Yield the image."""
        yield address_record(self.key, self.options)

    @property
    def name(self) -> str:
        """The address, for messages."""
        return shown_address(self.key)

    def is_deleted(self, key: str) -> bool:
        """Return False: a server that does not answer may answer tomorrow."""
        return False

    def covers(self, key: str) -> bool:
        """Return whether the key is the address."""
        return key == self.key


def first_address(place: Place) -> str:
    """Return the first address of a list or a table; empty if it has none, or cannot be read."""
    with suppress(Exception):  # reading it to its end says what is wrong
        _, row = next(_table(place))
        return str(row[address_column(row) or ""])
    return ""


def require_host(address: str, options: SourceOptions) -> None:
    """Check that some host is allowed if an address is on the web.

    :raises UsageError: If none is.
    """
    if is_address(address) and not options.allowed_hosts:
        host = urlsplit(address).hostname
        raise UsageError(f"{shown_address(address)} is on the web, and no host is allowed; give --allow-host {host}")


KIND = Kind("addresses", (".jsonl", ".csv"), read_addresses, "csv", "tables", is_versioned=False)
