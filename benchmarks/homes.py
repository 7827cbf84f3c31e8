"""The homes of a collection that need no server, at growing numbers of points: writing, opening, searching.

    python benchmarks/homes.py --points 2000 20000 --dimension 64 [--json]

Points are random unit vectors with payloads as the indexer writes them. Each home is filled, finished, closed and
opened again; a query is the median of 20, alone and with a filter on the width.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from qdrant_client import models

from cocoa_embed.integrations.qdrant.points import FileLocation, make_payload, point_id
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import Point, Query, Signature, Store
from cocoa_embed.integrations.qdrant.stores.client_filters import read_filter

HOMES = ("path", "edge")
POINTS_AT_ONCE = 64
QUERIES = 20
LINE = (
    "{points:7} points in --{home:5} {upsert_points_per_second:6.0f} a second, finish {finish_seconds:5.1f} s,"
    " open {open_seconds:5.2f} s, query {query_milliseconds:6.1f} ms, filtered {filtered_query_milliseconds:6.1f} ms"
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, nargs="+", default=[2000, 20_000])
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--home", choices=HOMES, action="append", help="the homes to measure [both]")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def unit_vectors(count: int, dimension: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((count, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def groups(vectors: np.ndarray) -> Iterator[list[Point]]:
    points = []
    for number, vector in enumerate(vectors):
        sha256 = f"{number:064x}"
        payload = make_payload(
            locations=[FileLocation(f"/photos/{number}.jpg", f"{number}.jpg", 1.7e9 + number)],
            description={"caption": f"picture number {number}", "metadata": {"licence": "CC0"}},
            sha256=sha256,
            bytes=1000,
            width=number,
            height=1,
            mime="image/jpeg",
        )
        points.append(Point(point_id(sha256), vector, payload))
    for start in range(0, len(points), POINTS_AT_ONCE):
        yield points[start : start + POINTS_AT_ONCE]


def query_seconds(store: Store, vectors: np.ndarray, query_filter: models.Filter | None = None) -> float:
    queries = [Query(vector, limit=10, filter=query_filter) for vector in vectors[:QUERIES]]
    return statistics.median(seconds_of(partial(store.search, query)) for query in queries)


def measure(home: str, count: int, dimension: int) -> dict[str, Any]:
    vectors = unit_vectors(count, dimension)
    lots = list(groups(vectors))
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(**{home: folder}, collection="images")
        store.create(Signature(model="random", fingerprint="0" * 64, dimension=dimension))
        writing = seconds_of(lambda: [store.upsert(points) for points in lots])
        finishing = seconds_of(store.finish)
        store.close()
        opening = seconds_of(store.count)
        queries = query_seconds(store, vectors)
        filtered = query_seconds(store, vectors, read_filter([f"width>={count // 2}"]))
        store.close()
    return {
        "home": home,
        "points": count,
        "dimension": dimension,
        "upsert_points_per_second": count / writing,
        "finish_seconds": finishing,
        "open_seconds": opening,
        "query_milliseconds": queries * 1000,
        "filtered_query_milliseconds": filtered * 1000,
    }


def main() -> None:
    options = parse()
    found = [measure(home, count, options.dimension) for count in options.points for home in options.home or HOMES]
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "homes": found}, indent=2))
        return
    print(f"{os.cpu_count()} cores, vectors of {options.dimension} dimensions")
    for figures in found:
        print(LINE.format(**figures))


if __name__ == "__main__":
    main()
