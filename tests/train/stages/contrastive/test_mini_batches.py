"""Mini-batches hold as many tokens as they may, and are what the processor makes of their items."""

from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from stages import contrastive_model
from torch import Tensor

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.stages.contrastive.inputs import preprocess_items
from cocoa_embed.train.stages.contrastive.mini_batches import MOST_ITEMS, TokenLimits, mini_batches, take


@pytest.fixture
def model(tiny_backbone: Backbone) -> SentenceTransformer:
    return contrastive_model(tiny_backbone)


@pytest.fixture
def items(sized_rows: list[Row]) -> list[Item]:
    """Images of 3 to 24 visual tokens, two of them in one item, and texts of one to many tokens, by turns."""
    images = [row.query.images[0] for row in sized_rows]
    pictures = [
        Item(images=(images[0],)),
        Item(text="a ring", images=(images[4], images[1])),
        Item(images=(images[3],)),
    ]
    texts = [Item(text="red " * count) for count in (30, 1, 9, 2, 14)]
    return [texts[0], pictures[0], texts[1], texts[2], pictures[1], pictures[2], *texts[3:]]


@pytest.mark.parametrize(("texts", "images"), [(1, 1), (20, 50), (64, 16), (10_000, 10_000)])
def test_mini_batches_are_within_their_limit_with_images_or_without(
    model: SentenceTransformer, items: list[Item], texts: int, images: int
) -> None:
    """Each item is in one of them, one longer than the limit alone, and the next item did not fit."""
    column = preprocess_items(model, items)
    lengths = column["attention_mask"].sum(dim=1).tolist()
    batches = mini_batches(column, TokenLimits(texts, images))
    assert sorted(item for batch in batches for item in batch) == list(range(len(items)))
    before: dict[bool, int] = {}
    for batch in batches:
        (pictured,) = {len(items[item].images) > 0 for item in batch}
        limit, widths = images if pictured else texts, sorted(lengths[item] for item in batch)
        assert len(batch) == 1 or widths[-1] * len(batch) <= limit
        assert pictured not in before or (before[pictured] + 1) * widths[0] > limit
        before[pictured] = len(batch)
    assert before.keys() == {True, False}
    assert (len(batches) == 2) is (texts == 10_000)
    assert (len(batches) == len(items)) is (texts == 1)


def test_sorting_leaves_less_padding(model: SentenceTransformer) -> None:
    column = preprocess_items(model, [Item(text="red " * (1 + 40 * (place % 2))) for place in range(16)])
    lengths = column["attention_mask"].sum(dim=1).tolist()
    batches = mini_batches(column, TokenLimits(300, 300))
    padded = sum(len(batch) * max(lengths[item] for item in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths) < 0.7 * column["attention_mask"].numel()


def test_no_mini_batch_has_more_items_than_the_loss_compares_at_once() -> None:
    column = {"input_ids": torch.ones(MOST_ITEMS + 1, 1), "attention_mask": torch.ones(MOST_ITEMS + 1, 1)}
    assert [len(each) for each in mini_batches(column, TokenLimits(10**6, 1))] == [MOST_ITEMS, 1]


@pytest.mark.parametrize("chosen", [[4], [5, 4, 1], [0, 4, 2], [2, 3], [6, 2, 6], [1, 1, 4, 4]])
def test_a_mini_batch_is_what_the_processor_makes_of_its_items(
    model: SentenceTransformer, items: list[Item], chosen: list[int]
) -> None:
    """Several images of an item, items taken twice, and texts alone, whose mini-batch has no images."""
    column = preprocess_items(model, items)
    kinds, rows, length = 3, *column["input_ids"].shape
    column["position_ids"] = torch.arange(kinds * rows * length).view(kinds, rows, length)
    column["image_cu_seqlens"] = torch.arange(5)  # of the whole column: no mini-batch has it
    found = take(column, chosen)
    positions = found.pop("position_ids")
    expected: dict[str, Any] = preprocess_items(model, [items[item] for item in chosen])
    if not any(items[item].images for item in chosen):
        expected["num_images_per_sample"] = torch.zeros(len(chosen), dtype=torch.long)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name
    assert torch.equal(positions, column["position_ids"][:, chosen, : expected["input_ids"].shape[1]])
