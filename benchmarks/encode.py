"""Compare embedding a folder of images with SentenceTransformer.encode and with the model alone.

    python benchmarks/encode.py /path/to/photos [--json]
    python benchmarks/encode.py /path/to/photos --model cocoa-qwen2vl --max-pixels 200704
    python benchmarks/encode.py /path/to/photos --size 2b --limit 1000

The same files are embedded in three ways, in turns, in one process: by ``SentenceTransformer.encode`` of the paths, by
``Encoder.stream_images`` of the paths, and by the model alone on prepared tensors that are already on its device. Each
way runs once unmeasured; rates are medians over ``--repeat`` turns. The embeddings of the first two are compared first.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality

from cocoa_embed.cli.output import silence_libraries
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.encode.batches import BatchLimits, ImageCost, plan_batches, token_counter
from cocoa_embed.encode.document_model import DocumentModel, Features
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.processor_lock import ProcessorLock
from cocoa_embed.images.find_files import find_images
from cocoa_embed.images.load import load_image
from cocoa_embed.model.attention import make_bidirectional
from cocoa_embed.model.backbone import Backbone, limit_images
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.loading import load_model
from shared.measuring import best_device, machine, seconds_of
from shared.models import MAX_LENGTH, TOKENIZER, model_config, stand_in_processor, untrained_model
from shared.output import command_line, report

SIZES = {"small": "small", "2b": "qwen2-vl-2b"}
DRAWN_SCENES = 200
LEAST_COSINE = 0.99
"""The minimum cosine between the two embeddings of a file: the two ways decode JPEG with different libraries."""


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("folder", nargs="?", help="a folder of images; without it, scenes of the demo are drawn")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="a SentenceTransformer folder; by default the demo's backbone")
    model.add_argument("--size", choices=SIZES, help="a Qwen2-VL of this size with random weights")
    parser.add_argument("--max-pixels", type=int, help="the processor's limit, instead of the model's")
    parser.add_argument("--device", help="the torch device; by default the fastest")
    parser.add_argument("--limit", type=int, help="the maximum number of files to use")
    parser.add_argument("--repeat", type=int, default=3, help="measured turns")
    parser.add_argument("--batch-size", type=int, default=32, help="batch size of all three ways")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="maximum tokens of a batch of the stream")
    parser.add_argument("--workers", type=int, help="workers of the stream; by default as many as the cores allow")
    return parser.parse_args()


def random_backbone(name: str, device: torch.device) -> Backbone:
    """Return a model with random weights, whose config has the token ids of the demo's tokenizer."""
    config = model_config(SIZES[name])
    processor = stand_in_processor(config)
    torch.manual_seed(0)
    with device:
        model = family_of(config).model_class(config)
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    make_bidirectional(model)
    return Backbone(model=model, processor=processor)


def open_model(options: argparse.Namespace, device: torch.device) -> SentenceTransformer:
    if options.model:
        model = load_model(options.model, str(device))
    else:
        backbone = random_backbone(options.size, device) if options.size else None
        with tempfile.TemporaryDirectory() as folder:
            model = untrained_model(Path(folder), backbone).to(device)
    if options.max_pixels:
        model.max_seq_length = MAX_LENGTH
        limit_images(model.processor, options.max_pixels)
    return model


def find_files(options: argparse.Namespace, drawn: Path) -> list[str]:
    """Return the files to embed; refuse a folder with files that ``encode`` takes for texts."""
    if options.folder is None:
        write_image_folder(drawn, "train", DRAWN_SCENES, seed=0)
    files = [str(path) for path in find_images([options.folder or drawn])][: options.limit]
    if not files or any(infer_modality(file) != "image" for file in files):
        raise SystemExit(f"{options.folder} needs images, and only with suffixes such as .jpg and .png")
    return files


def prepared(model: SentenceTransformer, files: list[str], options: argparse.Namespace) -> list[Features]:
    """Return the inputs of the model alone, on its device, in the batches that a stream would make of all files."""
    document_model, count_tokens = DocumentModel(model, ProcessorLock()), token_counter(model)
    images = [load_image(file) for file in files]
    costs = [ImageCost(count_tokens(*image.size), *image.size) for image in images]
    limits = BatchLimits(options.batch_size, options.batch_tokens, sys.maxsize)
    batches = [document_model.prepare([{"image": images[i]} for i in batch]) for batch in plan_batches(costs, limits)]
    return [
        {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in batches
    ]


def least_cosine(encoded: np.ndarray, streamed: np.ndarray) -> float:
    """Return the smallest cosine between the two embeddings of a file."""
    lengths = np.linalg.norm(encoded, axis=1) * np.linalg.norm(streamed, axis=1)
    least = float(((encoded * streamed).sum(axis=1) / lengths).min())
    if least < LEAST_COSINE:
        raise SystemExit(f"encode and stream_images disagree: the embeddings of a file have a cosine of {least:.4f}")
    return least


def compare(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device) if options.device else best_device()
    with tempfile.TemporaryDirectory() as drawn:
        files = find_files(options, Path(drawn))
        model = open_model(options, device)
        encoder, document_model = Encoder(model), DocumentModel(model, ProcessorLock())
        batches = prepared(model, files, options)

        def encode() -> np.ndarray:
            return model.encode_document(files, batch_size=options.batch_size)

        def stream() -> np.ndarray:
            settings = {"batch_size": options.batch_size, "batch_tokens": options.batch_tokens}
            outcomes = encoder.stream_images(((file, file) for file in files), workers=options.workers, **settings)
            return np.stack([embedded.vector for _, embedded in outcomes])

        def run_alone() -> None:
            for fetch in [document_model.launch(batch) for batch in batches]:
                fetch()

        ways: dict[str, Callable[[], Any]] = {"encode": encode, "stream": stream, "model_alone": run_alone}
        cosine = least_cosine(encode(), stream())
        run_alone()
        turns = [{name: seconds_of(way) for name, way in ways.items()} for _ in range(options.repeat)]
    seconds = {name: [turn[name] for turn in turns] for name in ways}
    rates = {name: len(files) / median(times) for name, times in seconds.items()}
    return {
        "model": options.model or options.size or TOKENIZER,
        "images": len(files),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches if "attention_mask" in batch),
        **{f"{name}_images_per_second": rate for name, rate in rates.items()},
        **{f"{name}_seconds": times for name, times in seconds.items()},
        "ratio": {other: rates["stream"] / rates[other] for other in ("encode", "model_alone")},
        "least_cosine": cosine,
        "batch_size_images": options.batch_size,
        "batch_tokens": options.batch_tokens,
        "workers": options.workers,
        **machine(device),
    }


def main() -> None:
    options = parse()
    silence_libraries()
    report(compare(options), show, as_json=options.json)


def show(result: dict[str, Any]) -> None:
    print(f"{result['model']}, {result['images']} images, {result['device']}, {result['cores']} cores")
    for name, title in {"encode": "encode", "stream": "ours", "model_alone": "model alone"}.items():
        times, rate = result[f"{name}_seconds"], result[f"{name}_images_per_second"]
        print(f"{title:12} {rate:8.1f} images/s  ({min(times):.2f} to {max(times):.2f} s)")
    ratio = result["ratio"]
    print(f"ours: {ratio['encode']:.2f} times encode, {ratio['model_alone']:.2f} of the model alone")


if __name__ == "__main__":
    main()
