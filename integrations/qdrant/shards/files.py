"""A folder of Parquet files with embeddings, local or remote; each file is complete or absent."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice, repeat
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cocoa_embed.data.places import file_system, mtime_of, reading
from cocoa_embed.errors import CocoaError, one_line, printable, require
from cocoa_embed.folders import SCRATCH_SUFFIX
from cocoa_embed.integrations.qdrant.stores.base import BOTH, IMAGE, Point, Signature

SIGNATURE_FILE = "cocoa-embed.json"
"""Names the model that made the embeddings of a folder."""

SUFFIX, FAILED_SUFFIX = ".parquet", ".failed.parquet"
"""The suffix of a file, and of one with images that could not be used."""

FAILED_KEY = "cocoa_embed.failed"
"""The key, in a file's metadata, of the images that could not be used, as JSON."""

ROWS_AT_ONCE = 1024
"""Rows of a row group: what a writer and a reader hold in memory."""


@dataclass(frozen=True)
class EmbeddingFolder:
    """A folder of embeddings: a path, or an address that fsspec knows."""

    place: str
    embed: str = IMAGE
    """What new embeddings hold for an image: one of ``EMBEDS``."""

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        require("pyarrow", "tables")
        with reading(self.place):
            return file_system(self.place)

    @property
    def _system(self) -> Any:  # noqa: ANN401
        return self._opened[0]

    @property
    def _path(self) -> str:
        return self._opened[1].rstrip("/")

    def names(self) -> list[str]:
        """Return the names of the Parquet files that are complete, in the order in which they were written.

        :raises CocoaError: If the folder cannot be listed.
        """
        try:
            listed = self._system.ls(self._path, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        except Exception as error:  # remote file systems raise nearly anything
            raise CocoaError(f"{printable(self.place)} cannot be listed ({one_line(error)})") from error
        written = {PurePosixPath(info["name"]).name: mtime_of(info) for info in listed}
        complete = (name for name in written if name.endswith(SUFFIX) and not name.startswith("."))
        return sorted(complete, key=lambda name: (written[name], name))

    def signature(self) -> Signature | None:
        """Return the model that made the embeddings; None for a folder without any.

        :raises CocoaError: If that cannot be read.
        """
        file = f"{self._path}/{SIGNATURE_FILE}"
        with reading(file):
            return Signature(**json.loads(self._system.cat_file(file))) if self._system.exists(file) else None

    def require_signature(self) -> Signature:
        """Return the model that made the embeddings.

        :raises CocoaError: If that cannot be read, or the folder has no embeddings.
        """
        if (found := self.signature()) is None:
            raise CocoaError(
                f"{printable(self.place)} has no {SIGNATURE_FILE}; name a folder that cocoa-embed embed wrote"
            )
        return found

    def sign(self, signature: Signature) -> None:
        """Record the model of a folder's embeddings.

        :raises CocoaError: If the folder has embeddings of another model, or cannot be written.
        """
        found = self.signature()
        if found is None:

            def fill(file: Any) -> str:  # noqa: ANN401
                file.write(json.dumps(asdict(signature), indent=2).encode())
                return SIGNATURE_FILE

            self._write(fill)
        else:
            found.require(signature, printable(self.place), "folder")

    def write(self, stem: str, points: Iterable[Point], failed: list[dict[str, str]], length: int) -> int:
        """Write a file, or none if there are no points; return their number.

        :param stem: Its name without a suffix. A file of this name with the other suffix is removed.
        :param points: Taken one by one.
        :param failed: The images that could not be used, complete when all points are taken.
        :param length: The number of values of an embedding, over all of its vectors.
        :raises CocoaError: If the file cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as parquet

        vectors = pa.list_(pa.float16(), length)
        fields = [("id", pa.string()), ("vector", vectors), ("payload", pa.string())]
        schema = pa.schema([*fields, ("caption", vectors)] if self.embed == BOTH else fields)
        count = 0

        def fill(file: Any) -> str | None:  # noqa: ANN401
            nonlocal count
            remaining = iter(points)
            with parquet.ParquetWriter(file, schema) as writer:
                for rows in iter(lambda: list(islice(remaining, ROWS_AT_ONCE)), []):
                    flat = np.concatenate([point.vector.ravel() for point in rows]).astype(np.float16)
                    columns = [
                        pa.array([point.id for point in rows]),
                        pa.FixedSizeListArray.from_arrays(pa.array(flat), length),
                        pa.array([json.dumps(point.payload, ensure_ascii=False) for point in rows]),
                    ]
                    if self.embed == BOTH:
                        captions = [None if row.caption is None else row.caption.astype(np.float16) for row in rows]
                        columns.append(pa.array(captions, type=vectors))
                    writer.write_table(pa.table(columns, schema=schema))
                    count += len(rows)
                if failed:
                    writer.add_key_value_metadata({FAILED_KEY: json.dumps(failed)})
            return None if count == 0 else stem + (FAILED_SUFFIX if failed else SUFFIX)

        self._write(fill)
        other = f"{self._path}/{stem}{SUFFIX if failed else FAILED_SUFFIX}"
        with reading(other):
            if count and self._system.exists(other):
                self._system.rm_file(other)
        return count

    def read(self, name: str) -> Iterator[Point]:
        """Yield the points of a file, some rows in memory.

        :raises CocoaError: If it cannot be read.
        """
        import pyarrow.parquet as parquet

        shape = self.require_signature().shape
        with reading(f"{self.place}/{name}"), self._system.open(f"{self._path}/{name}", "rb") as file:
            for rows in parquet.ParquetFile(file).iter_batches(batch_size=ROWS_AT_ONCE):
                flat = rows["vector"].flatten().to_numpy(zero_copy_only=False).astype(np.float32)
                vectors = flat.reshape(rows.num_rows, *shape)
                captions = rows["caption"].to_pylist() if "caption" in rows.schema.names else repeat(None)
                for id_, vector, payload, caption in zip(rows["id"], vectors, rows["payload"], captions, strict=False):
                    values = None if caption is None else np.array(caption, dtype=np.float32)
                    yield Point(id_.as_py(), vector, json.loads(payload.as_py()), values)

    def failed(self, name: str) -> list[dict[str, str]]:
        """Return the images that could not be used when a file was written, as ``{"path", "reason"}``.

        :raises CocoaError: If it cannot be read.
        """
        import pyarrow.parquet as parquet

        with reading(f"{self.place}/{name}"), self._system.open(f"{self._path}/{name}", "rb") as file:
            found = (parquet.read_metadata(file).metadata or {}).get(FAILED_KEY.encode(), b"[]")
            return list(json.loads(found))

    def _write(self, fill: Callable[[Any], str | None]) -> None:
        """Write a file that gets its name when it is complete.

        :param fill: Writes it and returns its name, or None to drop it.
        """
        scratch = f"{self._path}/.{uuid.uuid4().hex}{SCRATCH_SUFFIX}"
        try:
            self._system.makedirs(self._path, exist_ok=True)
            try:
                with self._system.open(scratch, "wb") as file:
                    name = fill(file)
                if name is not None:
                    self._system.mv(scratch, f"{self._path}/{name}")
            finally:
                if self._system.exists(scratch):
                    self._system.rm_file(scratch)
        except CocoaError:
            raise
        except Exception as error:  # remote file systems raise nearly anything
            raise CocoaError(f"{printable(self.place)} cannot be written ({one_line(error)})") from error
