"""The bytes and seconds per point in Parquet files and in Qdrant Edge, which has the engine and files of a server.

    python benchmarks/bytes.py --points 4000 10000 --dimension 1536 --create "" vectors=float16 [--json]

Points are random unit vectors with payloads as the indexer writes them. Every value is a slope: the difference between
the larger and the smaller number of points, per additional point. Bytes are blocks on the disk, grouped by what the
engine keeps in them. ``load`` reads the Parquet files and writes to Edge; ``load client`` writes to a server in another
process, which is not counted; ``build`` is the search index (HNSW, 16 edges). All three are seconds of one core, which
other programs on the machine hardly change.
"""

import os
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder
from cocoa_embed.integrations.qdrant.shards.load import load
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import Signature
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions, read_create
from shared.output import command_line, report
from shared.points_server import points_server
from stores import make_points, unit_vectors

PARTS = {
    "quantized vectors": r"vector_storage[^/]*/quantized",
    "search index": r"vector_index",
    "vectors": r"vector_storage",
    "payload index": r"payload_index",
    "payload": r"payload_storage",
    "log": r"/wal/",
}
"""What the engine's files hold, by patterns of their paths; the first match counts."""


def blocks(folder: Path) -> Counter[str]:
    """Return the bytes on the disk, grouped by what they hold."""
    sizes: Counter[str] = Counter()
    for file in (file for file in folder.rglob("*") if file.is_file()):
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, str(file))), "other")
        sizes[part] += file.stat().st_blocks * 512
    return sizes


def measure(create: str, count: int, dimension: int) -> dict[str, float]:
    """Return the bytes and the core seconds of ``count`` points."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = EmbeddingFolder(f"{scratch}/parquet")
        folder.sign(Signature("random", "0" * 64, dimension))
        folder.write("points", make_points(unit_vectors(count, dimension)), [], dimension)
        figures: dict[str, float] = {"parquet": blocks(Path(folder.place))["other"]}
        store = open_store(edge=f"{scratch}/edge", collection="c", options=StoreOptions(**read_create(create)))
        finish, store.finish = store.finish, lambda: None  # type: ignore[method-assign]
        started = time.process_time()
        load(folder, store)
        loaded = time.process_time()
        finish()
        figures |= {"load core seconds": loaded - started, "build core seconds": time.process_time() - loaded}
        store.close()
        with points_server() as url:
            store = open_store(url=url, collection="c")
            started = time.process_time()
            load(folder, store)
            figures["load client core seconds"] = time.process_time() - started
            store.close()
        return {**figures, **blocks(Path(scratch, "edge"))}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--points", type=int, nargs=2, default=[4000, 10_000])
    parser.add_argument("--dimension", type=int, default=1536)
    parser.add_argument("--create", nargs="+", default=["", "vectors=float16", "vectors=float16,quantization=turbo1"])
    options = parser.parse_args()
    few, many = options.points
    result: dict[str, Any] = {"dimension": options.dimension, "points": options.points}
    for create in options.create:
        small, large = (measure(create, count, options.dimension) for count in (few, many))
        result[create or "default"] = {key: (large[key] - small[key]) / (many - few) for key in sorted(large)}
    result["load"] = os.getloadavg()[0]
    report(result, show, as_json=options.json)


def show(result: dict[str, Any]) -> None:
    for create, figures in result.items():
        if isinstance(figures, dict):
            print(create, *(f"{key} {value:.6g}" for key, value in figures.items()), sep="\n  ")


if __name__ == "__main__":
    main()
