"""Prepare the demo's data from a folder of captioned photographs, and put a model's scores into words."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cocoa_embed.data import CaptionChoice
from cocoa_embed.data.image_folder import METADATA_FILE, DescribedImage, find_metadata, read_metadata
from cocoa_embed.errors import CocoaError, ImageError, RowError, printable
from cocoa_embed.images.load import load_image

HELD_OUT_RATIO = 5
"""One photograph in about this many is held out."""

FEWEST = 50

HIT = "hit@10"


def read_photographs(folder: Path, captions: CaptionChoice) -> list[DescribedImage]:
    """Return the captioned images of a folder, without opening any.

    :raises CocoaError: If the folder or its captions are missing, or there are fewer than ``FEWEST``.
    :raises RowError: If a row of its metadata cannot be used.
    """
    images: dict[Path, DescribedImage] = {}
    for image in read_metadata(find_metadata(folder)):
        if isinstance(image, RowError):
            raise image
        image.texts(captions)
        images.setdefault(image.path, image)
    if len(images) < FEWEST:
        raise CocoaError(
            f"{printable(folder)} has {len(images)} captioned images; the demo needs at least {FEWEST}, to train on"
            " some and measure on the others."
        )
    return list(images.values())


def split_photographs(folder: Path, captions: CaptionChoice, out: Path) -> tuple[dict[str, int], list[str]]:
    """Write the image folders ``train`` and ``held-out``, with links to the photographs or copies of them.

    The split of a photograph depends only on the bytes of its file, so that copies of it are in the same split.

    :returns: How many photographs each folder has, and a sentence for each unusable photograph, which is in neither.
    :raises CocoaError: As ``read_photographs`` does, or if too few can be used.
    """
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "held-out": []}
    faults = []
    for name in rows:
        (out / name).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(read_photographs(folder, captions)):
        try:
            load_image(image.path)
        except ImageError as error:
            faults.append(str(error))
            continue
        digest = hashlib.sha256(image.path.read_bytes()).digest()
        split = "train" if int.from_bytes(digest[:8], "big") % HELD_OUT_RATIO else "held-out"
        file_name = f"{number:05d}{image.path.suffix}"
        link_or_copy(image.path, out / split / file_name)
        rows[split].append({"file_name": file_name, "text": image.text, "captions": image.texts(captions)})
    if min(map(len, rows.values())) < 2:
        raise CocoaError(
            f"{printable(folder)} has {len(rows['train'])} usable photographs to train on and"
            f" {len(rows['held-out'])} to measure on; give more that are not copies of these."
            f" {' '.join(faults[:1])}".rstrip()
        )
    for name, of_split in rows.items():
        lines = "".join(f"{json.dumps(row)}\n" for row in of_split)
        (out / name / METADATA_FILE).write_text(lines, encoding="utf-8")
    return {name: len(of_split) for name, of_split in rows.items()}, faults


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to a file, or a copy where a link is not possible."""
    try:
        os.link(source.resolve(), target)  # resolved, as a relative symbolic link would lead nowhere from here
    except OSError:  # on another disk, or where files cannot be linked
        shutil.copyfile(source, target)


def findings(scores: Mapping[str, Any], parameters: int, training: int) -> Sequence[str]:
    """Return sentences that compare a model with chance and with contrastive learning alone.

    :param scores: From ``evaluate_pairs``, with a second model.
    :param parameters: The number of the model's parameters.
    :param training: The number of photographs that it was trained on.
    """
    sentences = [f"The model has {parameters / 1e6:.1f} million parameters and was trained on {training} photographs."]
    for way, metrics in scores["subsets"].items():
        (low, high), chance = scores["intervals"][way][HIT], scores["chance"][way][HIT]
        verdict = "above chance" if low > chance else "not distinguishable from chance"
        counts, query = scores["counts"][way], way.partition("_")[0]
        sentences.append(
            f"{way.replace('_', ' ').capitalize()}: {metrics[HIT]:.1%} ({low:.1%} to {high:.1%}) of"
            f" {counts['queries']} {query}s find a right answer among the first 10 of {counts['documents']}; a random"
            f" order, {chance:.1%}: {verdict}."
        )
        found = scores["comparison"][way][HIT]
        sentences.append(
            f"All three stages minus contrastive only: {found['difference']:+.1%} ({found['low']:+.1%} to "
            f"{found['high']:+.1%}); the intervals are over photographs, for one training of each."
        )
    sentences.append("A model of this size does not search photographs well: it shows the method, not its limits.")
    return sentences
