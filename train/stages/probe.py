"""Measure what ``<EOS>`` carries of an image (accuracy on masked tokens), and the geometry of embeddings."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cocoa_embed.data.rows import Item, ItemImage, Row
from cocoa_embed.evaluation.geometry import ALIGNMENT, geometry
from cocoa_embed.model.attention import Block
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch, Example
from cocoa_embed.train.loop.trainer import Measure

MATCHING_IMAGE = "accuracy_matching_image"
SHUFFLED_IMAGE = "accuracy_shuffled_image"
NO_IMAGE = "accuracy_no_image"

PROBE_METRICS = frozenset({MATCHING_IMAGE, ALIGNMENT})
"""Metrics that only the log lines of a probe have."""

Collate = Callable[[list[Example]], Batch]


class EosProbe:
    """Measures a bridge model on fixed rows: with the matching images, with shuffled images, and without.

    Block B sees block A through ``<EOS>`` alone, so the gain of the matching image over no image is what ``<EOS>``
    carries of it. The gain stays near zero on the stage's plateau and grows once the bridge is learned. A shuffled
    image may do worse than none: it misleads a model that reads ``<EOS>``.

    :param collate: The bridge collator. It masks the same tokens of a block B whatever image comes before it.
    :param rows: Rows with one image each, all different.
    :param batch_size: Rows to run at once.
    """

    def __init__(self, collate: Collate, rows: Sequence[Row], batch_size: int) -> None:
        def batches(rows: Sequence[Row]) -> list[Batch]:
            drawn = numbered(rows)
            return [collate(drawn[start : start + batch_size]) for start in range(0, len(drawn), batch_size)]

        matching = batches(rows)
        self.batches = {
            MATCHING_IMAGE: matching,
            SHUFFLED_IMAGE: batches(shuffle_images(rows)),
            NO_IMAGE: [hide_images(batch) for batch in matching],
        }

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the ratio of masked tokens predicted correctly, by ``MATCHING_IMAGE`` and the other two names."""
        with _measuring(model):
            return {name: _accuracy(model, batches) for name, batches in self.batches.items()}


class GeometryProbe:
    """Measures the geometry of a model's embeddings of pairs (``geometry``).

    :param collate: Turns items, and whether they are documents, into inputs as at inference.
    :param embed: Runs a model on such inputs: embeddings, float ``[B, D]``.
    :param rows: Two rows or more.
    :param batch_size: Items to run at once.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Item], bool], dict[str, Any]],
        embed: Callable[[nn.Module, dict[str, Any]], Tensor],
        rows: Sequence[Row],
        batch_size: int,
    ) -> None:
        self.embed = embed
        self.has_image: list[np.ndarray] = []
        self.batches: list[list[dict[str, Any]]] = []
        for is_document in (False, True):
            items = [row.positive if is_document else row.query for row in rows]
            self.has_image.append(np.array([item.image is not None for item in items]))
            starts = range(0, len(items), batch_size)
            self.batches.append([collate(items[start : start + batch_size], is_document) for start in starts])

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics; none if an embedding is not finite, which the loss of the next step shows too."""
        with _measuring(model):
            first, second = (self._embeddings(model, batches) for batches in self.batches)
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            return {}
        return geometry(first, second, first_has_image=self.has_image[0], second_has_image=self.has_image[1])

    def _embeddings(self, model: nn.Module, batches: Sequence[dict[str, Any]]) -> np.ndarray:
        """Return normalised embeddings, float64 ``[items, D]``."""
        device = _device(model)
        found = [self.embed(model, _on(device, batch)).float().cpu().double() for batch in batches]
        return nn.functional.normalize(torch.cat(found), dim=1).numpy()


def together(*probes: Measure) -> Measure:
    """Return a probe that measures everything that ``probes`` measure."""
    return lambda model: {name: value for probe in probes for name, value in probe(model).items()}


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Turn dropout and gradients off."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    device = _device(model)
    correct = total = 0.0
    for batch in batches:
        outputs = model(**_on(device, batch))
        correct += outputs["masked_token_accuracy"].item() * len(batch["target_ids"])
        total += len(batch["target_ids"])
    return correct / total


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def hide_images(batch: Batch) -> Batch:
    """Let no position see the visual tokens of block A, in a batch of the bridge collator.

    Everything else stays, positions and masked tokens too. The vision encoder still runs, without effect.
    """
    visual = (batch["blocks"] == Block.A) & (batch["mm_token_type_ids"] != 0)
    return {**batch, "blocks": batch["blocks"].masked_fill(visual, Block.PAD)}


def shuffle_images(rows: Sequence[Row]) -> list[Row]:
    """Give each row the image of the next one, and the last row the first image; on both sides, if both have one.

    Block A may be made of either side.
    """
    images = [row.image for row in rows]
    return [_with_image(row, image) for row, image in zip(rows, images[1:] + images[:1], strict=True)]


def _with_image(row: Row, image: ItemImage | None) -> Row:
    query, positive = (item if item.image is None else replace(item, image=image) for item in (row.query, row.positive))
    return replace(row, query=query, positive=positive)


def pictured_rows(rows: Sequence[Row], count: int) -> list[Row]:
    """Return the first rows with an image, one for each image, at most ``count``; none for fewer than two."""
    found = first_of_images(rows, count)
    return found if len(found) > 1 else []


def first_of_images(rows: Sequence[Row], count: int) -> list[Row]:
    """Return the first row of each of the first ``count`` images."""
    of_image: dict[ItemImage, Row] = {}
    for row in rows:
        if len(of_image) == count:
            break
        if row.image is not None:
            of_image.setdefault(row.image, row)
    return list(of_image.values())


def hold_out_rows(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Take ``count`` rows with different images from ``rows``; return them and the rows that do not leak them.

    Left out of both are other rows of the same images, on either side, and text-only rows that share a source or a text
    with a row of a held-out image: its captions would give away what is masked of each other. Another image with the
    same caption stays.

    Nothing is taken if fewer images would be left than are taken, nor for a count of one, which cannot be shuffled.
    """
    chosen = {row.image for row in first_of_images(rows, count)}
    held_out = [row for row in rows if row.image in chosen]
    images = {image for row in held_out for image in _images(row)}
    sources, texts = {row.source for row in held_out}, {text for row in held_out for text in _texts(row)}
    training_rows = [
        row
        for row in rows
        if images.isdisjoint(_images(row))
        and (row.image is not None or (row.source not in sources and texts.isdisjoint(_texts(row))))
    ]
    left = {image for row in training_rows for image in _images(row)}
    if count < 2 or len(chosen) < count or len(left) < count:
        return [], list(rows)
    return list({row.image: row for row in held_out}.values()), training_rows


def _images(row: Row) -> list[ItemImage]:
    return [item.image for item in (row.query, row.positive) if item.image is not None]


def _texts(row: Row) -> list[str]:
    return [item.text for item in (row.query, row.positive) if item.text is not None]
