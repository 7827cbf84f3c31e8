"""Tables for the tests of readers, small images, and an example row of each subset of MMEB-train."""

import csv
import json
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from cocoa_embed.data.mmeb import split_instruction
from cocoa_embed.data.rows import Item, Row

Values = dict[str, Any]


def png(shade: int = 0, size: tuple[int, int] = (56, 56)) -> bytes:
    """Return the bytes of a plain image."""
    buffer = BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, shade // 2)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Write ``a.png`` and so on, each of another shade."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / f"{name}.png").write_bytes(png(number * 10 % 256))


def write_table(path: Path, rows: list[Values]) -> Path:
    """Write rows in the format of the suffix; a CSV file holds lists as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            table.writeheader()
            for row in rows:
                table.writerow({key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()})
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


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
