"""What the resolution of images costs and gains: retrieval with one model and images scaled to several sizes.

    python benchmarks/photographs/resolution.py MODEL FOLDER [--sides 112 168 224] [--limit N] [--json]

MODEL is an export or a checkpoint, FOLDER an image folder with captions (the image folders of ``cocoa-embed train``).
For each side, ``max_pixels`` is its square. Scores in both directions are those of ``cocoa-embed eval pairs``, with
95 % intervals: the table shows hit@k, the R@k of the literature; the JSON also has recall@k. The seconds per image are
summed over all cores, for preparing a decoded image and embedding it in batches of ``--batch-size``: the fastest of
three turns over the first ``--timed`` images. The FLOPs per image are those of the matrix products.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.pairs import evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import Pair, read_pairs
from cocoa_embed.images.load import load_image
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.train.plan.cost import BatchShape, forward_flops, model_size

SHOWN = ("hit@1", "hit@5", "hit@10")
TURNS = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="an exported model, or a checkpoint")
    parser.add_argument("folder", type=Path, help="an image folder with captions")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[112, 168, 224], help="sides of square images, in pixels"
    )
    parser.add_argument("--limit", type=int, help="the maximum number of images, with all their captions")
    parser.add_argument("--timed", type=int, default=64, help="the number of images whose embedding is timed")
    parser.add_argument("--batch-size", type=int, default=16, help="batch size of the timed images")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def cost(encoder: Encoder, images: list[Image.Image], batch_size: int) -> dict[str, float]:
    """Return the mean cost of embedding an image."""
    model: Any = encoder.model
    processor, family = model.processor, family_of_images(model.processor)
    inputs = [{"image": image} for image in images]
    seconds = []
    for _ in range(1 + TURNS):  # the first turn warms up
        started = time.process_time()
        encoder.embed_documents(inputs, batch_size)
        seconds.append(time.process_time() - started)
    size, flops = model_size(model[0].auto_model.config), []
    for image, each in zip(images, inputs, strict=True):
        length = model.preprocess([each], prompt=model.prompts.get("document"))["input_ids"].shape[1]
        _, grid = family.patches(processor, image)
        flops.append(sum(forward_flops(size, BatchShape((length,), (tuple(grid[0].tolist()),)))))
    return {
        "seconds": min(seconds[1:]) / len(images),
        "gflops": fmean(flops) / 1e9,
        "visual_tokens": fmean(family.visual_tokens(processor, *image.size) for image in images),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    pairs = read_pairs(options.folder)
    kept = list(dict.fromkeys(pair.second for pair in pairs))[: options.limit]
    pairs = [Pair(*pair) for pair in pairs if pair.second in set(kept)]
    images = [load_image(item.images[0]) for item in kept[: options.timed]]
    sides = {}
    for side in options.sides:
        encoder = load_encoder(options.model, "cpu", max_pixels=side**2)
        scored = evaluate_pairs([encoder], pairs)
        keys = ("subsets", "intervals", "chance", "counts")
        sides[side] = {**{key: scored[key] for key in keys}, "an_image": cost(encoder, images, options.batch_size)}
    return {"model": options.model, "images": len(kept), "captions": len(pairs), "sides": sides,
            "torch_threads": torch.get_num_threads(), "torch_version": torch.__version__}  # fmt: skip


def show(result: dict[str, Any]) -> None:
    print(f"{result['model']}, {result['images']} images, {result['captions']} captions")
    head = ("side", "direction", *SHOWN, "visual tokens", "GFLOP", "CPU seconds")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for side, each in result["sides"].items():
        tokens, flops, seconds = (each["an_image"][key] for key in ("visual_tokens", "gflops", "seconds"))
        for direction, metrics in each["subsets"].items():
            ends = each["intervals"][direction]
            scores = (f"{metrics[name]:.3f} ({ends[name][0]:.3f} to {ends[name][1]:.3f})" for name in SHOWN)
            print(f"| {side} | {direction} | {' | '.join(scores)} | {tokens:.0f} | {flops:.2f} | {seconds:.4f} |")


def main() -> None:
    options = parse()
    try:
        result = measure(options)
    except CocoaError as error:
        sys.exit(f"resolution: {error}")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
