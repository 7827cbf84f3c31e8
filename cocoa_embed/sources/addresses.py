"""Images whose addresses are in a list, or in a column of a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from urllib.parse import urlsplit

from cocoa_embed.data.places import Place
from cocoa_embed.errors import ImageError, UsageError
from cocoa_embed.images.urls import is_web, shown_address
from cocoa_embed.sources.base import Record, SourceOptions
from cocoa_embed.sources.remote import read_address
from cocoa_embed.sources.shard_files import Kind, ShardFile, json_values
from cocoa_embed.sources.tables import ADDRESS_COLUMNS, address_column, table_rows

NEVER_LISTED = frozenset(
    "file local asynclocal git dvc ftp sftp ssh smb webdav webhdfs hdfs arrow_hdfs jupyter jlab dask root".split()
)
"""Protocols of files on this machine, or on one that the address names: a list must not bypass ``--allow-host``."""


def read_addresses(file: ShardFile) -> Iterator[Record]:
    """Yield the images of a list with one address per line, or of a table with a column of addresses.

    :raises Exception: If the file cannot be read.
    """
    for number, row in table_rows(file.place):
        column = address_column(row)
        address = "" if column is None else str(row[column]).strip()
        others = {key: value for key, value in row.items() if key != column}
        if "://" in address:
            yield Record(
                key=address,
                relative_key=address.partition("://")[2].partition("?")[0],
                read=partial(read_listed, address, file.options.allowed_hosts),
                metadata=json_values(others),
                metadata_source=file.key if others else None,
                checked_sources=frozenset({file.key}),
            )
        else:
            reason = f"has {address!a} instead of an address" if column else f"has no column {ADDRESS_COLUMNS[0]!r}"
            yield file.make_record(number, ImageError(f"{file.key}#{number}", reason), others)


def read_listed(address: str, allowed_hosts: tuple[str, ...]) -> bytes:
    """Return the bytes of an image in a list, which others may have written.

    :raises ImageError: If it is on this machine or one that the address names, or as ``read_address`` does.
    """
    protocol = address.partition("://")[0].lower()
    if len(protocol) < 2 or protocol in NEVER_LISTED:  # fsspec treats one letter as a drive of this machine
        reason = (
            f"cannot be read from a list ({protocol}); give http(s) addresses, or those of a bucket (s3, gs, hf, ...)"
        )
        raise ImageError(shown_address(address), reason)
    return read_address(address, allowed_hosts)


def first_address(place: Place) -> str:
    """Return the first address of a list or a table; empty if it has none, or cannot be read."""
    with suppress(Exception):  # reading all of it reports what is wrong
        _, row = next(table_rows(place))
        return str(row[address_column(row) or ""])
    return ""


def require_host(address: str, options: SourceOptions) -> None:
    """Check that some host is allowed if an address is on the web.

    :raises UsageError: If none is.
    """
    if is_web(address) and not options.allowed_hosts:
        host = urlsplit(address).hostname
        raise UsageError(f"{shown_address(address)} is on the web, and no host is allowed; give --allow-host {host}")


KIND = Kind("addresses", (".jsonl", ".csv"), read_addresses, "csv", "tables", is_versioned=False)
