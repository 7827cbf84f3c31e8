"""Measure the geometry of a model's embeddings during training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.evaluation.geometry import geometry
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.trainer import Measure
from cocoa_embed.train.stages.rendering import batched


def geometry_probe(
    collate: Callable[[Sequence[Item], bool], dict[str, Any]],
    embed: Callable[[nn.Module, dict[str, Any]], Tensor],
    rows: Sequence[Row],
    batch_size: int,
) -> Measure:
    """Return a probe of the geometry of a model's embeddings of pairs (``geometry``).

    It returns no metrics if an embedding is not finite; the loss of the next step then shows it, too.

    :param collate: Turns items, and whether they are documents, into inputs as at inference.
    :param embed: Runs a model on these inputs: embeddings, float ``[B, D]``.
    :param rows: Two rows or more.
    :param batch_size: Items to run at once.
    """
    sides = [row.query for row in rows], [row.positive for row in rows]
    has_image = [np.array([item.image is not None for item in items]) for items in sides]
    batches = [[collate(part, bool(side)) for part in batched(items, batch_size)] for side, items in enumerate(sides)]

    def embeddings(model: nn.Module, device: torch.device, of_side: list[dict[str, Any]]) -> np.ndarray:
        """Return normalised embeddings, float64 ``[items, D]``."""
        found = [embed(model, dict(send_to_device(batch, device))).float().cpu().double() for batch in of_side]
        return nn.functional.normalize(torch.cat(found), dim=1).numpy()

    def measure(model: nn.Module) -> dict[str, float]:
        with evaluating(model) as device:
            first, second = (embeddings(model, device, of_side) for of_side in batches)
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            return {}
        return geometry(first, second, first_has_image=has_image[0], second_has_image=has_image[1])

    return measure


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Turn dropout and gradients off, and yield the model's device."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def pictured_rows(rows: RowTable, count: int, seed: int) -> list[Row]:
    """Return the rows of ``draw_images`` in order; none if there are fewer than two images."""
    found = draw_images(rows, count, seed)
    return list(rows.select(np.sort(found))) if len(found) > 1 else []


def draw_images(rows: RowTable, count: int, seed: int) -> np.ndarray:
    """Return the index of the first row of each of at most ``count`` images, int64 ``[images]``.

    If several subsets have images, the seed draws equally many from each; otherwise they are the first images.
    """
    images, firsts = np.unique(rows.column("image_id"), return_index=True)
    places = np.sort(firsts[images != 0])
    subsets = rows.column("subset")[places]
    if len(np.unique(subsets)) > 1:
        generator = np.random.default_rng([seed, len(places)])
        shuffled = np.lexsort((generator.random(len(places)), subsets))
        _, starts, counts = np.unique(subsets[shuffled], return_index=True, return_counts=True)
        turn = np.arange(len(places)) - np.repeat(starts, counts)
        places = places[shuffled[np.lexsort((generator.random(len(places)), turn))]]
    return places[:count]
