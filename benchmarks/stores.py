"""Compare writing, opening and searching of the storage backends that need no server, at growing numbers of points.

    python benchmarks/stores.py --points 2000 20000 --dimension 64 [--json]

Points are random unit vectors with payloads as the indexer writes them. Each store is filled, closed and
opened again. Query times are medians of 20 queries, without and with a filter on the width. ``ratio`` is Qdrant Edge
(``--edge``) over the local folder (``--path``).
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from qdrant_client import models

from cocoa_embed.integrations.qdrant.points import FileLocation, make_payload, point_id
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import Point, Query, Signature
from cocoa_embed.integrations.qdrant.stores.client_filters import read_filter
from cocoa_embed.integrations.qdrant.stores.store import Store
from shared.measuring import best_device, machine, seconds_of
from shared.output import command_line, report

STORES = ("path", "edge")
POINTS_AT_ONCE = 64
QUERIES = 20
LINE = (
    "{points:7} points in --{store:5} {upsert_points_per_second:6.0f} a second,"
    " open {open_seconds:5.2f} s, query {query_milliseconds:6.1f} ms, filtered {filtered_query_milliseconds:6.1f} ms"
)


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--points", type=int, nargs="+", default=[2000, 20_000])
    parser.add_argument("--dimension", type=int, default=64)
    return parser.parse_args()


def unit_vectors(count: int, dimension: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((count, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_points(vectors: np.ndarray) -> Iterator[Point]:
    for number, vector in enumerate(vectors):
        sha256 = f"{number:064x}"
        location = FileLocation(f"/photos/{number}.jpg", f"{number}.jpg", 1.7e9 + number)
        content = {"sha256": sha256, "bytes": 1000, "width": number, "height": 1, "mime": "image/jpeg"}
        description = {"caption": f"picture number {number}", "metadata": {"licence": "CC0"}, "caption_source": None}
        payload = make_payload(content, [location], description)
        yield Point(point_id(sha256), vector, payload)


def query_milliseconds(store: Store, vectors: np.ndarray, query_filter: models.Filter | None = None) -> float:
    queries = [Query(vector, limit=10, filter=query_filter) for vector in vectors[:QUERIES]]
    return 1000 * statistics.median(seconds_of(partial(store.search, query)) for query in queries)


def measure(name: str, count: int, dimension: int) -> dict[str, float]:
    vectors = unit_vectors(count, dimension)
    points = list(make_points(vectors))
    batches = [points[start : start + POINTS_AT_ONCE] for start in range(0, count, POINTS_AT_ONCE)]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(**{name: folder}, collection="images")
        store.create(Signature(model="random", fingerprint="0" * 64, dimension=dimension))
        writing = seconds_of(lambda: [store.insert(batch) for batch in batches]) + seconds_of(store.finish)
        store.close()
        measured = {
            "upsert_points_per_second": count / writing,
            "open_seconds": seconds_of(store.count),
            "query_milliseconds": query_milliseconds(store, vectors),
            "filtered_query_milliseconds": query_milliseconds(store, vectors, read_filter([f"width>={count // 2}"])),
        }
        store.close()
    return measured


def compare(count: int, dimension: int) -> dict[str, Any]:
    path, edge = (measure(name, count, dimension) for name in STORES)
    return {"points": count, "path": path, "edge": edge, "ratio": {key: edge[key] / path[key] for key in path}}


def main() -> None:
    options = parse()
    compared = [compare(count, options.dimension) for count in options.points]
    document = {"dimension": options.dimension, "stores": compared, **machine(best_device())}
    report(document, show, as_json=options.json)


def show(result: dict[str, Any]) -> None:
    print(f"{result['cores']} cores, vectors of {result['dimension']} dimensions")
    for comparison in result["stores"]:
        for name in STORES:
            print(LINE.format(points=comparison["points"], store=name, **comparison[name]))


if __name__ == "__main__":
    main()
