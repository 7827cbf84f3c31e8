from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_backbones import every_family

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.lengths import item_lengths, row_lengths
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.rendering import render_items

SIZES = ((56, 56), (300, 40), (31, 500), (28, 28), (700, 700))
"""The last one has more pixels than the processor's limit."""


@pytest.fixture
def pictures(tmp_path: Path) -> dict[Path, tuple[int, int]]:
    sizes = {tmp_path / f"{width}x{height}.png": (width, height) for width, height in SIZES}
    for path, size in sizes.items():
        Image.new("RGB", size).save(path)
    return sizes


@every_family
def test_lengths_are_those_of_the_rendered_sequences(
    tiny_backbone: Backbone, pictures: dict[Path, tuple[int, int]]
) -> None:
    images = [Item(images=(path,)) for path in pictures]
    both = [Item(text="a red ring, top left", images=(path,)) for path in pictures]
    items = [*images, *both, Item(text="blue"), Item(text="a large green star and a cross")]
    rendered = render_items(tiny_backbone.processor, items)["attention_mask"].sum(dim=1) - 1
    lengths = item_lengths(items, tiny_backbone.processor, pictures)
    assert len(set(lengths)) > 3
    np.testing.assert_array_equal(lengths, rendered.numpy())


def test_a_rows_length_is_that_of_its_bridge_sequence(
    tiny_backbone: Backbone, pictures: dict[Path, tuple[int, int]]
) -> None:
    picture, cross = Item(images=(next(iter(pictures)),)), Item(text="blue cross")
    texts = (Item(text="a red ring"), Item(text="a cross, blue, on white"), Item(text="blue cross on white " * 200))
    rows = [Row(query, text, source="") for query, text in zip((picture, cross, picture), texts, strict=True)]
    lengths = row_lengths(rows, tiny_backbone.processor, pictures)
    batch = BridgeCollator(tiny_backbone.processor, seed=0)(numbered(rows))
    np.testing.assert_array_equal(lengths, batch["attention_mask"].sum(dim=1).numpy())
    assert lengths[2] == tiny_backbone.processor.tokenizer.model_max_length
