"""Measure what ``<EOS>`` carries of an image, by the accuracy on masked tokens of rows held out of training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from cocoa_embed.data.rows import Item, ItemImage, Row
from cocoa_embed.evaluation.geometry import ALIGNMENT
from cocoa_embed.model.attention import Block
from cocoa_embed.train.data.row_table import RowTable, content_id, image_id
from cocoa_embed.train.data.rows import Example, numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.trainer import Measure
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.probe import draw_images, evaluating, geometry_probe
from cocoa_embed.train.stages.rendering import batched, render_items, row_images

MATCHING_IMAGE = "accuracy_matching_image"
SHUFFLED_IMAGE = "accuracy_shuffled_image"
NO_IMAGE = "accuracy_no_image"

PROBE_METRICS = frozenset({MATCHING_IMAGE, ALIGNMENT})
"""Metrics that only log lines with a probe have."""


def bridge_probe(
    collator: BridgeCollator, rows: Sequence[Row], *, prompts: Mapping[str, str], batch_size: int
) -> Measure:
    """Return a probe of a ``BridgeModel``: its accuracy on masked tokens, and the geometry of its embeddings.

    :param rows: Rows with one image each, all different.
    :param prompts: The instructions for ``query`` and ``document`` that the exported model has.
    :param batch_size: Rows to run at once.
    """

    def collate(items: Sequence[Item], is_document: bool) -> Batch:
        return render_items(collator.processor, items, prompt=prompts.get("document" if is_document else "query", ""))

    def embed(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        embeddings: torch.Tensor = model(**batch, embeds=True)["embeddings"]
        return embeddings

    batches, of_embeddings = eos_batches(collator, rows, batch_size), geometry_probe(collate, embed, rows, batch_size)
    return lambda model: {**eos_accuracies(model, batches), **of_embeddings(model)}


def eos_batches(
    collate: Callable[[list[Example]], Batch], rows: Sequence[Row], batch_size: int
) -> dict[str, list[Batch]]:
    """Return the same rows with the matching images, with shuffled images, and without images.

    Block B sees block A through ``<EOS>`` alone, so the gain of the matching image over no image shows what
    ``<EOS>`` carries of it. The gain stays near zero on the stage's plateau and grows once the bridge is learned. A
    shuffled image may do worse than none: it misleads a model that reads ``<EOS>``.

    :param collate: The bridge collator. It masks the same tokens of block B whatever the image.
    """
    matching, shuffled = (
        [collate(part) for part in batched(numbered(each), batch_size)] for each in (rows, shuffle_images(rows))
    )
    return {MATCHING_IMAGE: matching, SHUFFLED_IMAGE: shuffled, NO_IMAGE: [without_images(each) for each in matching]}


def eos_accuracies(model: nn.Module, batches: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    """Return the ratio of masked tokens that a ``BridgeModel`` predicts correctly, by the names of ``batches``."""
    accuracies = {}
    with evaluating(model) as device:
        for name, of_name in batches.items():
            outputs = [model(**send_to_device(batch, device)) for batch in of_name]
            counts = [len(batch["target_ids"]) for batch in of_name]
            correct = [
                found["masked_token_accuracy"].item() * count for found, count in zip(outputs, counts, strict=True)
            ]
            accuracies[name] = sum(correct) / sum(counts)
    return accuracies


def without_images(batch: Batch) -> Batch:
    """Mask the visual tokens of block A out of attention, in a batch of the bridge collator.

    Everything else stays, including positions and masked tokens. The vision encoder still runs, without effect.
    """
    visual = (batch["blocks"] == Block.A) & (batch["mm_token_type_ids"] != 0)
    return {**batch, "blocks": batch["blocks"].masked_fill(visual, Block.PAD)}


def shuffle_images(rows: Sequence[Row]) -> list[Row]:
    """Give each row the images of the next one, and the last row those of the first; texts stay."""
    images = [row_images(row) for row in rows]
    return [_with_images(row, others) for row, others in zip(rows, images[1:] + images[:1], strict=True)]


def _with_images(row: Row, images: tuple[ItemImage, ...]) -> Row:
    """Give all images to each side that has one: together they are the images of block A."""
    query, positive = (replace(item, images=images) if item.images else item for item in (row.query, row.positive))
    return replace(row, query=query, positive=positive)


def hold_out_rows(rows: RowTable, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out rows of ``count`` different images (``draw_images``), and leave out all rows that would leak them.

    A row leaks them if it has an image of a row with one of these images. A row without images leaks them if it shares
    a source or a text with such a row, as captions of one image give away each other's masked words. Rows of another
    image with the same caption stay.

    Nothing is held out if fewer images would be left than are held out, or if ``count`` is 1: one image cannot be
    shuffled.

    :returns: The indices in ``rows`` of the rows held out, one for each image, and of those to train on, int64.
    """
    everything, images = np.arange(len(rows)), rows.column("image_id")
    chosen = images[draw_images(rows, count, seed)]
    of_chosen = np.flatnonzero(np.isin(images, chosen))
    held_out = rows.select(of_chosen)
    sides = [side for row in held_out for side in (row.query, row.positive)]
    texts = [content_id(Item(side.text)) for side in sides if side.text is not None]
    leaks = np.isin(rows.column("source_id"), held_out.column("source_id"))
    for side in ("query_id", "positive_id"):
        leaks |= np.isin(rows.column(side), texts)
    leaks &= rows.column("images") == 0
    leaks |= rows.with_images(np.array([image_id(image) for side in sides for image in side.images]))
    left = np.unique(images[~leaks & (images != 0)])
    if count < 2 or len(chosen) < count or len(left) < count:
        return everything[:0], everything
    lasts = [of_chosen[images[of_chosen] == image][-1] for image in chosen]
    return np.sort(np.array(lasts)), everything[~leaks]
