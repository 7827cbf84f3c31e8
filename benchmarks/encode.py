"""Embedding a folder of images: ours against SentenceTransformer.encode, and against the model alone.

    python benchmarks/encode.py /path/to/photos [--json]
    python benchmarks/encode.py /path/to/photos --model cocoa-qwen2vl --max-pixels 200704
    python benchmarks/encode.py /path/to/photos --size 2b --limit 1000

The same files three ways, in turns, in one process: ``SentenceTransformer.encode`` of the paths, our stream of the
paths, and the model alone on tensors that are on its device already, in the batches that the stream would make of all
files at once. Each way runs once unmeasured; figures are medians over ``--repeat`` turns. That the first two agree is
checked first.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality
from transformers import Qwen2VLImageProcessor

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.encode.batches import BatchLimits, ImageCost, plan_batches, token_counter
from cocoa_embed.encode.document_model import DocumentModel, Features
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.run import default_workers
from cocoa_embed.images.find_files import find_images
from cocoa_embed.images.load import load_image
from cocoa_embed.model.attention import make_bidirectional
from cocoa_embed.model.backbone import SUPPORTED, Backbone, builtin_backbones, load_backbone, load_processor
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.model.loading import load_model
from cocoa_embed.model.template import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from steps.real_configs import real_config

SIZES = {"small": "small", "2b": "qwen2-vl-2b"}
NO_PROMPTS = {"query": "", "document": ""}
DRAWN_SCENES = 200
MAX_LENGTH = 32_768
LEAST_COSINE = 0.99
"""Of one file's embeddings by the two ways, which decode JPEGs with different libraries."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="a folder of images; without it, scenes of the demo are drawn")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="a SentenceTransformer folder; by default the demo's backbone")
    model.add_argument("--size", choices=SIZES, help="a Qwen2-VL of this size with random weights")
    parser.add_argument("--max-pixels", type=int, help="the processor's limit, instead of the model's own")
    parser.add_argument("--device", help="the torch device; by default the fastest")
    parser.add_argument("--limit", type=int, help="use so many files")
    parser.add_argument("--repeat", type=int, default=3, help="measured turns")
    parser.add_argument("--batch-size", type=int, default=32, help="of all three ways")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of the stream")
    parser.add_argument("--workers", type=int, help="of the stream; by default as the cores allow")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def random_backbone(name: str, device: torch.device) -> Backbone:
    """Return a model of a real size under the demo's tokenizer, whose ids its config then names."""
    processor = load_processor(builtin_backbones()[0], max_length=MAX_LENGTH)
    processor.image_processor = Qwen2VLImageProcessor()
    config = real_config(name)
    config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id = (
        processor.tokenizer.convert_tokens_to_ids([IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END])
    )
    torch.manual_seed(0)
    with device:
        model = SUPPORTED[config.model_type](config)
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    make_bidirectional(model)
    return Backbone(model=model, processor=processor)


def open_model(options: argparse.Namespace, device: torch.device) -> SentenceTransformer:
    if options.model:
        model = load_model(options.model, str(device))
    else:
        with tempfile.TemporaryDirectory() as folder:
            if options.size:
                random_backbone(SIZES[options.size], device).save(Path(folder))
            else:
                load_backbone(builtin_backbones()[0], max_length=MAX_LENGTH).save(Path(folder))
            model = build_sentence_transformer(Path(folder), prompts=NO_PROMPTS).to(device)
    if options.max_pixels:
        model.processor.image_processor.size["longest_edge"] = options.max_pixels
        model.max_seq_length = MAX_LENGTH
    return model


def find_files(options: argparse.Namespace, drawn: Path) -> list[str]:
    """Return the files to embed, and refuse those that ``encode`` would take for texts."""
    folder = options.folder
    if folder is None:
        folder = drawn
        write_image_folder(drawn, "train", DRAWN_SCENES, seed=0)
    files = [str(path) for path in find_images([folder])][: options.limit]
    texts = [file for file in files if infer_modality(file) != "image"]
    if texts or not files:
        what = f"{len(texts)} files that encode takes for texts, such as {texts[0]}" if texts else "no images"
        raise SystemExit(f"{folder} holds {what}; give a folder of images, with suffixes such as .jpg and .png")
    return files


def prepared(model: SentenceTransformer, files: list[str], options: argparse.Namespace) -> list[Features]:
    """Return the inputs of the model alone, on its device."""
    document_model = DocumentModel(model)
    images = [load_image(file) for file in files]
    count_tokens = token_counter(model)
    costs = [ImageCost(count_tokens(*image.size), *image.size) for image in images]
    limits = BatchLimits(options.batch_size, options.batch_tokens, sys.maxsize)
    batches = [document_model.prepare([images[i] for i in batch]) for batch in plan_batches(costs, limits)]
    return [
        {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in batches
    ]


def run_alone(model: SentenceTransformer, batches: list[Features]) -> None:
    document_model = DocumentModel(model)
    launched = [document_model.launch(batch) for batch in batches]
    for batch in launched:
        batch.fetch()


def check_agreement(encoded: np.ndarray, streamed: np.ndarray) -> float:
    """Return the least cosine of one file's embeddings by the two ways."""
    lengths = np.linalg.norm(encoded, axis=1) * np.linalg.norm(streamed, axis=1)
    least = float(((encoded * streamed).sum(axis=1) / lengths).min())
    if least < LEAST_COSINE:
        raise SystemExit(f"the two ways do not agree: a file's embeddings have a cosine of {least:.4f}")
    return least


def compare(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as drawn:
        files = find_files(options, Path(drawn))
        model = open_model(options, device)
        encoder = Encoder(model)
        batches = prepared(model, files, options)

        def stream() -> np.ndarray:
            settings = {"batch_size": options.batch_size, "batch_tokens": options.batch_tokens}
            outcomes = encoder.stream_images(((file, file) for file in files), workers=options.workers, **settings)
            return np.stack([embedded.vector for _, embedded in outcomes])

        def encode() -> np.ndarray:
            return model.encode_document(files, batch_size=options.batch_size)

        ways: dict[str, Callable[[], Any]] = {
            "encode": encode,
            "stream": stream,
            "model_alone": lambda: run_alone(model, batches),
        }
        least_cosine = check_agreement(encode(), stream())
        seconds = measure(ways, options.repeat)
    rates = {name: len(files) / statistics.median(times) for name, times in seconds.items()}
    return {
        "model": options.model or options.size or builtin_backbones()[0],
        "images": len(files),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches if "attention_mask" in batch),
        **{f"{name}_images_per_second": rate for name, rate in rates.items()},
        **{f"{name}_seconds": times for name, times in seconds.items()},
        "ratio": {other: rates["stream"] / rates[other] for other in ("encode", "model_alone")},
        "least_cosine": least_cosine,
        "batch_size_images": options.batch_size,
        "batch_tokens": options.batch_tokens,
        "workers": options.workers or default_workers(is_on_cpu=device.type == "cpu"),
        **machine(device),
    }


def measure(ways: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Return the seconds of each way, turn by turn; what else the machine does then falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cores": available_cores(),
        "torch_threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "sentence_transformers_version": sentence_transformers.__version__,
    }


def show(document: dict[str, Any]) -> None:
    machine = f"{document['device']}, {document['cores']} cores, {document['torch_threads']} torch threads"
    print(f"{document['model']}, {document['images']} images, on {machine}, {document['workers']} workers")
    for name, title in {"encode": "encode", "stream": "ours", "model_alone": "model alone"}.items():
        times = document[f"{name}_seconds"]
        rate = document[f"{name}_images_per_second"]
        print(f"{title:12} {rate:8.1f} images/s  ({min(times):.2f} to {max(times):.2f} s)")
    ratio = document["ratio"]
    print(f"ours: {ratio['encode']:.2f} times encode, {ratio['model_alone']:.2f} of the model alone")


def main() -> None:
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    document = compare(options)
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        show(document)


if __name__ == "__main__":
    main()
