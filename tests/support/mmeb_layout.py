"""Data in the layout of ``TIGER-Lab/MMEB-eval``, for each of the four meta-tasks."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from fake_model import COLOURS
from scored_model import mosaic

Values = dict[str, Any]
NAMES = list(COLOURS)
SCHEMA = pa.schema(
    [
        ("qry_text", pa.string()),
        ("qry_img_path", pa.string()),
        ("tgt_text", pa.list_(pa.string())),
        ("tgt_img_path", pa.list_(pa.string())),
    ]
)


def write_subset(data: Path, name: str, rows: list[Values], shards: int = 1) -> Path:
    """Write rows as a subset; return its folder."""
    folder = data / name
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]
        file = folder / f"test-{shard:05}-of-{shards:05}.parquet"
        parquet.write_table(pa.Table.from_pylist(part, schema=SCHEMA), file)
    return folder


def write_mosaics(images: Path, subset: str, count: int, seed: int) -> list[str]:
    """Write pictures of all colours in turn; return their paths below ``images``."""
    (images / subset).mkdir(parents=True, exist_ok=True)
    paths = [f"{subset}/{number:04}.png" for number in range(count)]
    for number, path in enumerate(paths):
        mosaic(seed * 1000 + number, NAMES[number % len(NAMES)]).save(images / path)
    return paths


def classification(images: Path, rows: int) -> list[Values]:
    paths = write_mosaics(images, "ImageNet-1K", rows, 1)
    labels = [f"{colour}, a kind of {colour}" for colour in NAMES]
    return [
        {
            "qry_text": "<|image_1|>\nRepresent the given image for classification\n",
            "qry_img_path": path,
            "tgt_text": [
                labels[number % len(NAMES)],
                *(each for each in labels if each != labels[number % len(NAMES)]),
            ],
            "tgt_img_path": [""] * len(labels),
        }
        for number, path in enumerate(paths)
    ]


def question_answering(images: Path, rows: int) -> list[Values]:
    paths = write_mosaics(images, "OK-VQA", max(1, rows // 2), 2)
    question = "<|image_1|>\nRepresent the given image with the following question: what colour, {}?\n"
    return [
        {
            "qry_text": question.format(number),
            "qry_img_path": paths[number % len(paths)],
            "tgt_text": [NAMES[number % len(paths) % len(NAMES)], *(f"wrong {number} {each}" for each in range(6))],
            "tgt_img_path": [""] * 7,
        }
        for number in range(rows)
    ]


def retrieval(images: Path, rows: int) -> list[Values]:
    paths = write_mosaics(images, "MSCOCO_t2i", rows, 3)
    generator = np.random.default_rng(4)
    found = []
    for number in range(rows):
        others = [path for path in generator.permutation(paths).tolist() if path != paths[number]][: rows - 3]
        found.append(
            {
                "qry_text": f"Find me an everyday image that matches the given caption: {NAMES[number % 4]} {number}\n",
                "qry_img_path": "",
                "tgt_text": ["<|image_1|>\nRepresent the given image.\n"] * (len(others) + 1),
                "tgt_img_path": [paths[number], *others],
            }
        )
    return found


def grounding(images: Path, rows: int) -> list[Values]:
    paths = write_mosaics(images, "RefCOCO-Matching", rows, 5)
    find = '<|image_1|>\nSelect the portion of the image that follows the language expressions: "{}"\n'
    keep = '<|image_1|>\nSelect the portion of the image that follows the language expressions: "the {} one"\n'
    return [
        {
            "qry_text": find.format(f"{NAMES[number % 4]} thing {number}"),
            "qry_img_path": paths[number],
            "tgt_text": [keep.format(NAMES[(number + each) % 4]) for each in range(4)],
            "tgt_img_path": [paths[(number + each // 2) % rows] for each in range(4)],
        }
        for number in range(rows)
    ]


SUBSETS = {
    "ImageNet-1K": classification,
    "OK-VQA": question_answering,
    "MSCOCO_t2i": retrieval,
    "RefCOCO-Matching": grounding,
}
"""A subset of each meta-task."""


def write_benchmark(folder: Path, rows: int = 12) -> tuple[Path, Path]:
    """Write a subset of each meta-task; return the folders of data and of images."""
    data, images = folder / "MMEB-eval", folder / "eval_images"
    for name, make in SUBSETS.items():
        write_subset(data, name, make(images, rows))
    return data, images
