"""Data in the layout of ``TIGER-Lab/MMEB-eval``, a subset for each of the four meta-tasks; texts of MMEB-train."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from fake_model import COLOURS
from scored_model import mosaic

from cocoa_embed.data.mmeb import split_instruction
from cocoa_embed.data.rows import Item, Row

Values = dict[str, Any]
NAMES = list(COLOURS)
TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema({"qry_text": pa.string(), "qry_img_path": pa.string(), "tgt_text": TEXTS, "tgt_img_path": TEXTS})


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


def mmeb_row(text: str, image: str, targets: Sequence[str], target_images: Sequence[str] | None = None) -> Values:
    images = [""] * len(targets) if target_images is None else list(target_images)
    return {"qry_text": text, "qry_img_path": image, "tgt_text": list(targets), "tgt_img_path": images}


def classification(paths: list[str]) -> Iterator[Values]:
    labels = [f"{colour}, a kind of {colour}" for colour in NAMES]
    for number, path in enumerate(paths):
        right = labels[number % len(NAMES)]
        others = [label for label in labels if label != right]
        yield mmeb_row("<|image_1|>\nRepresent the given image for classification\n", path, [right, *others])


def question_answering(paths: list[str]) -> Iterator[Values]:
    used = paths[: max(1, len(paths) // 2)]
    for number in range(len(paths)):
        right = NAMES[number % len(used) % len(NAMES)]
        text = f"<|image_1|>\nRepresent the given image with the following question: what colour, {number}?\n"
        yield mmeb_row(text, used[number % len(used)], [right, *(f"wrong {number} {each}" for each in range(6))])


def retrieval(paths: list[str]) -> Iterator[Values]:
    generator = np.random.default_rng(4)
    for number, path in enumerate(paths):
        others = [other for other in generator.permutation(paths).tolist() if other != path][: len(paths) - 3]
        text = f"Find me an everyday image that matches the given caption: {NAMES[number % 4]} {number}\n"
        yield mmeb_row(text, "", ["<|image_1|>\nRepresent the given image.\n"] * (len(others) + 1), [path, *others])


def grounding(paths: list[str]) -> Iterator[Values]:
    select = "<|image_1|>\nSelect the portion of the image that follows the language expressions: "
    for number, path in enumerate(paths):
        targets = [f'{select}"the {NAMES[(number + each) % 4]} one"\n' for each in range(4)]
        images = [paths[(number + each // 2) % len(paths)] for each in range(4)]
        yield mmeb_row(f'{select}"{NAMES[number % 4]} thing {number}"\n', path, targets, images)


SUBSETS = {
    "ImageNet-1K": classification,
    "OK-VQA": question_answering,
    "MSCOCO_t2i": retrieval,
    "RefCOCO-Matching": grounding,
}
"""A subset of each meta-task."""


def subset_rows(images: Path, name: str, rows: int) -> list[Values]:
    """Write the images of a subset; return its rows."""
    return list(SUBSETS[name](write_mosaics(images, name, rows, list(SUBSETS).index(name))))


def write_benchmark(folder: Path, rows: int = 12) -> tuple[Path, Path]:
    """Write a subset of each meta-task; return the folders of data and of images."""
    data, images = folder / "MMEB-eval", folder / "eval_images"
    for name in SUBSETS:
        write_subset(data, name, subset_rows(images, name, rows))
    return data, images


QUESTION = "Represent the given image with the following question: |Where is this picture taken?"
IMAGE = "Represent the given image.|"
EXAMPLES = {
    "ImageNet_1K": ("Represent the given image for classification|", "|plane, carpenter's plane, woodworking plane"),
    "N24News": (
        "Represent the given news image with the following caption for domain classification: |Danai Gurira.",
        "|Theater",
    ),
    "HatefulMemes": (
        "Represent the given image for binary classification to determine whether it constitutes hateful speech or not"
        "|",
        "|Yes",
    ),
    "VOC2007": ("Identify the object shown in the image|", "|chair"),
    "SUN397": ("Identify the scene shown in the image|", "|firing range indoor"),
    **dict.fromkeys(
        ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"), (QUESTION, "|On a railway.")
    ),
    "VisDial": (
        "Represent the given dialogue about an image, which is used for image retrieval: |Q:male or female\nA:male",
        "Represent the given image|",
    ),
    "CIRR": (
        "Given an image, find a similar everyday image with the described changes: |Many hamsters together.",
        IMAGE,
    ),
    "VisualNews_t2i": ("Retrieve an image of this news caption. |The lift gave him silver. A second sentence.", IMAGE),
    "VisualNews_i2t": ("Find a caption for the news in the given photo.|", "|The lift gave him silver."),
    "MSCOCO_t2i": ("Find me an everyday image that matches the given caption: |A teddy bear shop.", IMAGE),
    "MSCOCO_i2t": ("Find an image caption describing the given everyday image.|", "|A teddy bear shop."),
    "NIGHTS": ("Find a day-to-day image that looks similar to the provided image.|", IMAGE),
    "WebQA": (
        "Find a Wikipedia image that answers this question: |Who has longer hair?",
        "Represent the given Wikipedia image with related text information: |Island Women by Bakusen Tsuchida, 1912.",
    ),
    "MSCOCO": (
        'Select the portion of the image that isolates the object labeled as |"hot dog"',
        "Represent the given cropped image of the object|",
    ),
}
"""A query and a positive of each subset of MMEB-train; a bar separates instruction and content."""

IMAGES_OF_QUERIES = (*EXAMPLES.keys() - {"VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA"},)
IMAGES_OF_POSITIVES = ("VisDial", "CIRR", "VisualNews_t2i", "MSCOCO_t2i", "NIGHTS", "WebQA", "MSCOCO")


def example_row(subset: str, query_image: Path, positive_image: Path) -> Row:
    """Return the example of a subset as a row, with an image on the sides that have one in the subset."""
    query, positive = (example.replace("|", "") for example in EXAMPLES[subset])
    (asked, question), (given, answer) = (
        split_instruction(subset, "query", query),
        split_instruction(subset, "target", positive),
    )
    return Row(
        Item(question, (query_image,) * (subset in IMAGES_OF_QUERIES), asked),
        Item(answer, (positive_image,) * (subset in IMAGES_OF_POSITIVES), given),
        source=f"{subset}, row 1",
        subset=subset,
    )
