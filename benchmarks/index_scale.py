"""The memory and the time of indexing runs over growing numbers of images, without real images or a real model.

    python benchmarks/index_scale.py --images 100000 --store edge server [--json]

A source yields records without files, in shards of 1000 as folders do, and an encoder draws random vectors. Everything
between them and the store is the real code. ``edge`` is Qdrant Edge in a temporary folder, ``server`` a stand-in for
Qdrant that keeps payloads in a separate process. The first run stores every image, the second finds all unchanged.
Memory is the process's private (anonymous) memory above that at the start of the run: at a tenth of the images and at
the end. ``ratio`` is the memory at the end over that at a tenth.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.jobs import EmbeddedImage
from cocoa_embed.integrations.qdrant.indexing.manifest import Manifest
from cocoa_embed.integrations.qdrant.indexing.run import IndexRun
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import Signature
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import Record
from shared.output import command_line, process_bytes, report
from shared.points_server import points_server

IMAGES_PER_SHARD = 1000
MEBIBYTE = 2**20
LINE = (
    "{store:6} {run:6} {images:8} images in {seconds:6.0f} s ({images_per_second:6.0f} a second),"
    " {tenth_mebibytes:7.1f} MiB at a tenth, {end_mebibytes:7.1f} MiB at the end"
)


@dataclass(frozen=True)
class Numbers:
    """A shard: consecutive numbers, each the content of an image."""

    first: int
    stop: int
    version: str = ""

    @property
    def key(self) -> str:
        return f"/photos/{self.first:09d}"

    def records(self) -> Iterator[Record]:
        for number in range(self.first, self.stop):
            name, data = f"{self.first:09d}/{number:09d}.jpg", b"%d" % number
            yield Record(f"/photos/{name}", name, lambda data=data: data, 1.7e9 + number, len(data))


@dataclass(frozen=True)
class Photos:
    count: int
    name: str = "/photos"

    def shards(self) -> Iterator[Numbers]:
        for first in range(0, self.count, IMAGES_PER_SHARD):
            yield Numbers(first, min(self.count, first + IMAGES_PER_SHARD))

    def covers(self, key: str) -> bool:
        return key.startswith("/photos/")

    def is_deleted(self, key: str) -> bool:
        return False


@dataclass
class RandomEncoder:
    """Stands for an ``Encoder``: it draws a vector for each image."""

    dimension: int
    name: str = "random"
    fingerprint: str = "0" * 64

    def stream_images(self, images: Iterable[tuple[Any, bytes]], **_: object) -> Generator[tuple[Any, EmbeddedImage]]:
        generator = np.random.default_rng(0)
        for key, _data in images:
            vector = generator.standard_normal(self.dimension, dtype=np.float32)
            yield key, EmbeddedImage(vector / np.linalg.norm(vector), 640, 480, "image/jpeg", None)


def anonymous_bytes() -> int:
    """Return the private memory of the process."""
    return process_bytes("smaps_rollup", "Anonymous:")


def measure(store: Store, count: int, dimension: int, run: str) -> dict[str, float]:
    """Return the measurements of one run."""
    start, began, done, tenth = anonymous_bytes(), time.perf_counter(), 0, 0
    encoder = cast("Encoder", RandomEncoder(dimension))

    def note(images: int) -> None:
        nonlocal done, tenth
        if done < count // 10 <= done + images:
            tenth = anonymous_bytes() - start
        done += images

    work = IndexRun([Photos(count)], store, encoder, Manifest(None), on_done=note)
    work.run(batch_size=32)
    store.finish()
    seconds, end = time.perf_counter() - began, anonymous_bytes() - start
    summary = work.summary(seconds)
    assert {"first": summary.indexed, "second": summary.unchanged}[run] == count, summary
    return {
        "images": count,
        "seconds": seconds,
        "images_per_second": count / seconds,
        "tenth_mebibytes": tenth / MEBIBYTE,
        "end_mebibytes": end / MEBIBYTE,
        "ratio": end / max(tenth, 1),
    }


def compare(name: str, count: int, dimension: int) -> dict[str, dict[str, float]]:
    """Return the measurements of both runs into a store."""
    with contextlib.ExitStack() as stack:
        if name == "server":
            store = open_store(url=stack.enter_context(points_server()), collection="images")
        else:
            store = open_store(edge=stack.enter_context(tempfile.TemporaryDirectory()), collection="images")
        stack.callback(store.close)
        store.create(Signature("random", "0" * 64, dimension))
        return {run: measure(store, count, dimension, run) for run in ("first", "second")}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=32)
    parser.add_argument("--store", nargs="+", choices=("edge", "server"), default=["edge", "server"])
    options = parser.parse_args()
    figures = {name: compare(name, options.images, options.dimension) for name in options.store}
    report({"dimension": options.dimension, "load": os.getloadavg()[0], **figures}, show, as_json=options.json)


def show(result: dict[str, Any]) -> None:
    for name in ("edge", "server"):
        for run, values in result.get(name, {}).items():
            print(LINE.format(store=name, run=run, **values))


if __name__ == "__main__":
    main()
