"""How long rows are as sequences, told before any of their images is preprocessed."""

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import ProcessorMixin

from cocoa_embed.model.visual_tokens import visual_tokens
from cocoa_embed.train.data.rows import Item, Row, RowImage

TEXTS_AT_ONCE = 10_000
"""Texts whose tokens are in memory together; only their number is kept."""


def row_lengths(rows: Sequence[Row], processor: ProcessorMixin, sizes: Mapping[RowImage, tuple[int, int]]) -> list[int]:
    """Return the tokens of each row when its query and positive stand in one sequence.

    :param sizes: Width and height of every image, in pixels.
    :raises KeyError: If an image has no size.
    """
    items = [item for row in rows for item in (row.query, row.positive)]
    longest = processor.tokenizer.model_max_length
    whole = item_lengths(items, processor, sizes).reshape(len(rows), 2).sum(axis=1) + 1
    lengths: list[int] = np.minimum(whole, longest).tolist()
    return lengths


def item_lengths(
    items: Sequence[Item], processor: ProcessorMixin, sizes: Mapping[RowImage, tuple[int, int]]
) -> np.ndarray:
    """Return the tokens of each item without ``<EOS>``, int64 ``[items]``; truncation is left out.

    :raises KeyError: If an image has no size.
    """
    texts = list({item.text for item in items if item.text is not None})
    of_text: dict[str, int] = {}
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        encoded = processor.tokenizer(some, add_special_tokens=False)["input_ids"]
        of_text.update(zip(some, map(len, encoded), strict=True))
    of_size = {
        size: visual_tokens(processor.image_processor, *size)
        for size in {sizes[i.image] for i in items if i.image is not None}
    }
    return np.array(
        [
            (of_text[item.text] if item.text is not None else 0)
            # An image stands between two tokens that mark its start and its end.
            + (of_size[sizes[item.image]] + 2 if item.image is not None else 0)
            for item in items
        ],
        dtype=np.int64,
    )
