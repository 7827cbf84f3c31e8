"""Write points to a file, whole or not at all: JSON lines, or Parquet with the columns of ``cocoa-embed embed``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import IO

from cocoa_embed.errors import CocoaError, UsageError, printable, require
from cocoa_embed.folders import SCRATCH_SUFFIX
from cocoa_embed.integrations.qdrant.points import plain_payload
from cocoa_embed.integrations.qdrant.stores.base import StoredPoint

STANDARD_OUTPUT = "-"
ROWS_AT_ONCE = 1024
"""Rows of a row group of Parquet: what is in memory."""


def check_out(out: str) -> None:
    """Check that points can be written to a file.

    :raises UsageError: If its suffix is of neither format.
    :raises CocoaError: If its folder does not exist, or the package for Parquet is not installed.
    """
    if out == STANDARD_OUTPUT:
        return
    if Path(out).suffix not in WRITERS:
        raise UsageError(f"{printable(out)} is no file for points; give one that ends in .jsonl or .parquet, or -")
    if Path(out).suffix == ".parquet":
        require("pyarrow", "train")
    if not Path(out).absolute().parent.is_dir():
        raise CocoaError(f"{printable(out)} cannot be written, its folder does not exist")


def write_points(out: str, points: Iterator[StoredPoint], standard_output: IO[str]) -> int:
    """Write points to a file, or as JSON lines to standard output; return their number.

    :raises CocoaError: If the file cannot be written.
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
        scratch.unlink(missing_ok=True)
    return count


def write_json_lines(file: Path | AbstractContextManager[IO[str]], points: Iterator[StoredPoint]) -> int:
    """Write a JSON object a line, in ASCII: ``id``, ``payload`` and, where it was read, ``vector``."""
    count = 0
    with file.open("w", encoding="ascii") if isinstance(file, Path) else file as lines:
        for id_, payload, vector in points:
            count += 1
            row = {"id": id_, "payload": plain_payload(payload)}
            if vector is not None:
                row["vector"] = vector.tolist()
            lines.write(f"{json.dumps(row)}\n")
    return count


def write_parquet(out: Path, points: Iterator[StoredPoint]) -> int:
    """Write the columns ``id``, ``payload`` as JSON and, where it was read, ``vector`` (float32)."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    count, writer = 0, None
    with out.open("wb") as file:
        for rows in iter(lambda: list(islice(points, ROWS_AT_ONCE)), []):
            columns = {
                "id": pa.array([point.id for point in rows], pa.string()),
                "payload": pa.array([json.dumps(plain_payload(point.payload), ensure_ascii=False) for point in rows]),
            }
            if rows[0].vector is not None:
                vectors = [point.vector.tolist() for point in rows if point.vector is not None]
                columns["vector"] = pa.array(vectors, pa.list_(pa.float32(), len(vectors[0])))
            table = pa.table(columns)
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
            count += len(rows)
        if writer is None:
            parquet.write_table(pa.table({"id": pa.array([], pa.string()), "payload": pa.array([], pa.string())}), file)
        else:
            writer.close()
    return count


WRITERS: dict[str, Callable[[Path, Iterator[StoredPoint]], int]] = {
    ".jsonl": write_json_lines,
    ".parquet": write_parquet,
}
