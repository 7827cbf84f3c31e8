"""Indexing end to end against embedding alone, in each home that needs no server, and what a second run costs.

    python benchmarks/index.py path/to/photos --model cocoa-qwen2vl [--json]
    python benchmarks/index.py               # the demo's images and model, after make demo

Embedding alone is the same stream of the same files through the same model, stored nowhere. Every round does each way
once, in turn; rates are medians over rounds. Stores are made anew for each round. The model is loaded once.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.images.find_files import find_images
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

HOMES = ("path", "edge")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", default="cocoa-demo/data/held-out", help="a folder of images"
    )
    parser.add_argument("--model", default="cocoa-qwen2vl", help="a SentenceTransformer folder or hub name")
    parser.add_argument("--home", choices=HOMES, action="append", help="the homes to measure [both]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def embed_alone(encoder: Encoder, files: list[Path], batch_size: int) -> None:
    for _ in encoder.stream_images(((file, file) for file in files), batch_size=batch_size):
        pass


def measure(options: argparse.Namespace) -> dict[str, Any]:
    encoder = load_encoder(options.model, options.device)
    files = find_images([options.folder])
    embed_alone(encoder, files[: 2 * options.batch_size], options.batch_size)
    seconds: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        alone = timed(lambda: embed_alone(encoder, files, options.batch_size))
        seconds.setdefault("embedding", []).append(alone)
        for home in options.home or HOMES:
            with (
                tempfile.TemporaryDirectory() as folder,
                QdrantIndexer(encoder, **{home: folder}, batch_size=options.batch_size) as indexer,
            ):
                first, second = (timed(lambda: indexer.index(options.folder, progress=False)) for _ in range(2))
            seconds.setdefault(home, []).append(first)
            seconds.setdefault(f"{home} again", []).append(second)
    return document(options, len(files), {name: statistics.median(times) for name, times in seconds.items()})


def document(options: argparse.Namespace, count: int, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "images": count,
        "embedding_images_per_second": count / seconds["embedding"],
        "homes": {
            home: {
                "index_images_per_second": count / seconds[home],
                "ratio": seconds["embedding"] / seconds[home],
                "second_run_milliseconds_per_image": seconds[f"{home} again"] / count * 1000,
            }
            for home in options.home or HOMES
        },
        "rounds": options.rounds,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def show(found: dict[str, Any]) -> None:
    print(f"{found['images']} images, {found['cores']} cores, {found['device']}, medians of {found['rounds']} rounds")
    print(f"embedding alone  {found['embedding_images_per_second']:8.1f} images/s")
    for home, figures in found["homes"].items():
        print(
            f"--{home:14} {figures['index_images_per_second']:8.1f} images/s, {figures['ratio']:.2f} of it;"
            f" a second run {figures['second_run_milliseconds_per_image']:.2f} ms an image"
        )


def main() -> None:
    options = parse()
    found = measure(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    sys.exit(main())
