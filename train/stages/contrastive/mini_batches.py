"""Cut a column of items into mini-batches by tokens: items of similar length together, with images or without."""

from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from typing import Any

import torch
from torch import Tensor

CPU_TOKENS = 8192
"""The tokens of a mini-batch where ``auto`` tries nothing: on a CPU, and in plans."""

MOST_ITEMS = 1024
"""The most items of a mini-batch, and the most rows of the score matrix that are computed at once."""

ITEM_KEYS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "position_ids",
        "num_images_per_sample",
        "blocks",
        "masked_ids",
    }
)
"""Tensors with an entry for each item."""

IMAGE_KEYS = frozenset({"image_grid_thw", "image_digests"})
"""Tensors with an entry for each image; ``pixel_values`` have one for each patch, and other tensors are left out."""


@dataclass
class TokenLimits:
    """The maximum tokens of a mini-batch, padding included, for texts and for items with images."""

    texts: int
    images: int


def mini_batches(column: dict[str, Any], limits: TokenLimits) -> list[list[int]]:
    """Cut the items of a column into mini-batches in which all items have images, or none has.

    Items are sorted by length, so that there is little padding. An item that is longer than the limit runs alone.

    :param column: From ``preprocess_items``.
    :returns: The numbers of the items of each mini-batch.
    """
    lengths, images = _counts(column)
    order = sorted(range(len(lengths)), key=lambda item: (images[item] > 0, lengths[item]))
    batches: list[list[int]] = []
    for pictured, items in groupby(order, key=lambda item: images[item] > 0):
        limit, batch = limits.images if pictured else limits.texts, list[int]()
        for item in items:  # the longest of its mini-batch so far
            if batch and ((len(batch) + 1) * lengths[item] > limit or len(batch) == MOST_ITEMS):
                batches.append(batch)
                batch = []
            batch.append(item)
        batches.append(batch)
    return batches


def take(column: dict[str, Any], items: list[int]) -> dict[str, Any]:
    """Return some items of a right-padded column, padded to the longest of them; an item may occur several times."""
    (lengths, counts), taken = _counts(column), dict[str, Any]()
    firsts, width = list(accumulate(counts, initial=0)), max(lengths[item] for item in items)
    images = list(chain.from_iterable(range(firsts[item], firsts[item + 1]) for item in items))
    for key, value in column.items():
        if not isinstance(value, Tensor):
            taken[key] = value
        elif key in ITEM_KEYS:  # position_ids begin with an axis of position types
            taken[key] = value[items] if value.ndim == 1 else value[..., items, :width]
        elif images and key == "pixel_values":
            parts = value.split(column["image_grid_thw"].prod(dim=1).tolist())
            taken[key] = torch.cat([parts[image] for image in images])
        elif images and key in IMAGE_KEYS:
            taken[key] = value[images]
    return taken


def _counts(column: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the numbers of tokens and of images of each item."""
    tokens = column["attention_mask"].sum(dim=1)
    images = column.get("num_images_per_sample", torch.zeros_like(tokens))
    return tokens.tolist(), images.tolist()
