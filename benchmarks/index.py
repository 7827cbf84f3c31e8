"""Compare end-to-end indexing with embedding alone, in each storage backend that needs no server.

    python benchmarks/index.py path/to/photos --model cocoa-qwen2vl [--json]
    python benchmarks/index.py               # the demo's images and model, after make demo

Embedding alone runs the same files through the same model and stores nothing. The second run over an index finds all
files unchanged. Every round measures embedding alone once and, in each backend, both runs into a new store; rates are
medians over the rounds.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.images.find_files import find_images
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from shared.measuring import machine, seconds_of
from shared.output import command_line, report

STORES = ("path", "edge")


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("folder", nargs="?", default="cocoa-demo/data/held-out", help="a folder of images")
    parser.add_argument("--model", default="cocoa-qwen2vl", help="a SentenceTransformer folder or hub name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device")
    return parser.parse_args()


def embed_alone(encoder: Encoder, files: list[Path], batch_size: int) -> None:
    for _ in encoder.stream_images(((file, file) for file in files), batch_size=batch_size):
        pass


def measure(options: argparse.Namespace) -> dict[str, Any]:
    encoder = load_encoder(options.model, options.device)
    files = find_images([options.folder])
    embed_alone(encoder, files[: 2 * options.batch_size], options.batch_size)
    embedding: list[float] = []
    indexing: dict[str, list[tuple[float, float]]] = {store: [] for store in STORES}
    for _ in range(options.rounds):
        embedding.append(seconds_of(partial(embed_alone, encoder, files, options.batch_size)))
        for store in STORES:
            with (
                tempfile.TemporaryDirectory() as folder,
                QdrantIndexer(encoder, **{store: folder}, batch_size=options.batch_size) as indexer,
            ):
                run = partial(indexer.index, options.folder, progress=False)
                indexing[store].append((seconds_of(run), seconds_of(run)))
    count, alone = len(files), median(embedding)
    return {
        "images": count,
        "embedding_images_per_second": count / alone,
        "stores": {
            store: {
                "index_images_per_second": count / median(first for first, _ in runs),
                "ratio": alone / median(first for first, _ in runs),
                "second_run_milliseconds_per_image": median(second for _, second in runs) / count * 1000,
            }
            for store, runs in indexing.items()
        },
        "rounds": options.rounds,
        **machine(encoder.model.device),
    }


def main() -> None:
    options = parse()
    report(measure(options), show, as_json=options.json)


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['images']} images, {result['cores']} cores, {result['device']}, medians of {result['rounds']} rounds"
    )
    print(f"embedding alone  {result['embedding_images_per_second']:8.1f} images/s")
    for store, metrics in result["stores"].items():
        print(
            f"--{store:14} {metrics['index_images_per_second']:8.1f} images/s, {metrics['ratio']:.2f} of embedding"
            f" alone; second run {metrics['second_run_milliseconds_per_image']:.2f} ms an image"
        )


if __name__ == "__main__":
    main()
