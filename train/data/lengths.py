"""The sequence lengths of rows, computed without preprocessing an image."""

from collections.abc import Sequence

import numpy as np
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.model.template import eos_tokens, literal, special_tokens
from cocoa_embed.train.data.image_check import ImageSizes

TEXTS_AT_ONCE = 10_000
"""Texts that are tokenized together; the number of their tokens is kept, the tokens are not."""


def row_lengths(rows: Sequence[Row], processor: ProcessorMixin, sizes: ImageSizes) -> list[int]:
    """Return the number of tokens of each row, with its query and positive in one sequence.

    :param sizes: Width and height of images, in pixels.
    :raises ImageError: If an image without a known size cannot be used.
    """
    items = [item for row in rows for item in (row.query, row.positive)]
    ends = len(eos_tokens(processor.tokenizer))
    untruncated = item_lengths(items, processor, sizes).reshape(len(rows), 2).sum(axis=1) + ends
    lengths: list[int] = np.minimum(untruncated, processor.tokenizer.model_max_length).tolist()
    return lengths


def item_lengths(items: Sequence[Item], processor: ProcessorMixin, sizes: ImageSizes) -> np.ndarray:
    """Return the number of tokens of each item without ``<EOS>`` and without truncation, int64 ``[items]``.

    :raises ImageError: If an image without a known size cannot be used.
    """
    texts = list({item.full_text for item in items if item.full_text is not None})
    of_text: dict[str | None, int] = {None: 0}
    special = special_tokens(processor.tokenizer)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        ids = processor.tokenizer([literal(text, special) for text in some], add_special_tokens=False)["input_ids"]
        of_text |= zip(some, map(len, ids), strict=True)
    family = family_of_images(processor)
    distinct = {sizes[image] for item in items for image in item.images}
    of_size = {size: family.visual_tokens(processor, *size) for size in distinct}
    of_images = (sum(of_size[sizes[image]] + family.markers.around for image in item.images) for item in items)
    return np.array(
        [of_text[item.full_text] + image for item, image in zip(items, of_images, strict=True)], dtype=np.int64
    )
