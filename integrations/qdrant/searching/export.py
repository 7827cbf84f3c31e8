"""Write points to a file, whole or not at all: JSON lines, or Parquet with the columns of ``cocoa-embed embed``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from cocoa_embed.errors import CocoaError, UsageError, printable, require
from cocoa_embed.folders import SCRATCH_SUFFIX
from cocoa_embed.integrations.qdrant.points import plain_payload
from cocoa_embed.integrations.qdrant.stores.base import StoredPoint

STANDARD_OUTPUT = "-"
ROWS_AT_ONCE = 1024
"""Rows per Parquet row group, which is held in memory."""


def check_out(out: str) -> None:
    """Check that points can be written to a file.

    :raises UsageError: If its suffix is of neither format.
    :raises CocoaError: If its folder does not exist, or the package for Parquet is not installed.
    """
    if out == STANDARD_OUTPUT:
        return
    if Path(out).suffix not in WRITERS:
        raise UsageError(f"{printable(out)} is not a file for points; give one that ends in .jsonl or .parquet, or -")
    if Path(out).suffix == ".parquet":
        require("pyarrow", "tables")
    if not Path(out).absolute().parent.is_dir():
        raise CocoaError(f"{printable(out)} cannot be written: its folder does not exist")


def write_points(out: str, points: Iterable[StoredPoint], standard_output: IO[str]) -> int:
    """Write points to a file, or as JSON lines to standard output; return their number.

    :raises CocoaError: If the file cannot be written.
    :raises OSError: If standard output cannot.
    """
    if out == STANDARD_OUTPUT:
        return write_json_lines(nullcontext(standard_output), points)
    scratch = Path(f"{out}.{os.getpid()}{SCRATCH_SUFFIX}")
    try:
        count = WRITERS[Path(out).suffix](scratch, points)
        os.replace(scratch, out)
    except OSError as error:
        raise CocoaError(f"{printable(out)} cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):  # it is not there, or its name is too long
            scratch.unlink()
    return count


def rows(points: Iterable[StoredPoint]) -> Iterator[dict[str, Any]]:
    """Yield id, payload and, where they were read, the vectors of points; of several, the first."""
    for id_, payload, vector, caption, _ in points:
        vectors = {"vector": vector, "caption_vector": caption}
        values = {name: each.tolist() for name, each in vectors.items() if each is not None}
        yield {"id": id_, "payload": plain_payload(payload)} | values


def write_json_lines(file: Path | AbstractContextManager[IO[str]], points: Iterable[StoredPoint]) -> int:
    """Write one JSON object per line, in ASCII: ``id``, ``payload``, and ``vector`` and ``caption_vector``."""
    count = 0
    with file.open("w", encoding="ascii") if isinstance(file, Path) else file as lines:
        for count, row in enumerate(rows(points), 1):  # noqa: B007 - the last is returned
            lines.write(f"{json.dumps(row)}\n")
    return count


def write_parquet(out: Path, points: Iterable[StoredPoint]) -> int:
    """Write columns ``id``, ``payload`` as JSON, ``vector`` and ``caption_vector``, null where there is none."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    vectors = [(name, pa.list_(pa.float32())) for name in ("vector", "caption_vector")]
    schema = pa.schema([("id", pa.string()), ("payload", pa.string()), *vectors])
    count, listed = 0, ({**row, "payload": json.dumps(row["payload"], ensure_ascii=False)} for row in rows(points))
    with out.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
        for batch in iter(lambda: list(islice(listed, ROWS_AT_ONCE)), []):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


WRITERS: dict[str, Callable[[Path, Iterable[StoredPoint]], int]] = {
    ".jsonl": write_json_lines,
    ".parquet": write_parquet,
}
