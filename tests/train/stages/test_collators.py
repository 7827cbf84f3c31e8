import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import bridge_collator, warmup_collator
from torch import Tensor
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.train.data.rows import Draw, numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.bridge.collator import BridgeCollator, split_blocks
from cocoa_embed.train.stages.rendering import joined, render_items, text_tokens

LONG_TEXT = "large red circle at top left and small blue ring at bottom right on white " * 20

COLLATORS = pytest.mark.parametrize("make", [warmup_collator, bridge_collator])
Make = Callable[[Backbone], Any]


@pytest.fixture
def processor(tiny_backbone: Backbone) -> ProcessorMixin:
    return tiny_backbone.processor


def row_of(query: Item, caption: str) -> Row:
    return Row(query=query, positive=Item(text=caption), source="rows.jsonl, line 1")


def originals(batch: Batch) -> Tensor:
    """Return the token ids as they were before any was masked."""
    return batch["input_ids"].masked_scatter(batch["masked_tokens"], batch["target_ids"])


def assert_only_masked(batch: Batch, eligible: Tensor, processor: ProcessorMixin) -> None:
    """Check that eligible tokens alone are masked, at least one in each row, and stand behind the mask token."""
    masked = batch["masked_tokens"]
    assert masked.any(dim=1).all()
    assert not (masked & ~eligible).any()
    assert torch.equal(batch["input_ids"] == processor.tokenizer.mask_token_id, masked)
    assert len(batch["target_ids"]) == masked.sum()


def test_text_tokens_are_ordinary_words_without_the_first_token(
    processor: ProcessorMixin, scene_rows: list[Row]
) -> None:
    batch = render_items(processor, [Item(text="small red ring"), joined(scene_rows[0])])
    found = text_tokens(batch, processor)
    assert (batch["attention_mask"] == 0).any()
    words = [processor.tokenizer.decode(ids[where]) for ids, where in zip(batch["input_ids"], found, strict=True)]
    without_first = processor.tokenizer.decode(processor.tokenizer("small red ring")["input_ids"][1:-1])
    assert words == [without_first, scene_rows[0].positive.text]


def test_warmup_masks_text_tokens_and_keeps_them_as_targets(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    batch, processor = warmup_collator(tiny_backbone)(numbered(scene_rows)), tiny_backbone.processor
    clean = render_items(processor, [joined(row) for row in scene_rows])
    eligible = text_tokens(clean, processor)
    assert_only_masked(batch, eligible, processor)
    assert torch.equal(originals(batch), clean["input_ids"])
    assert 0.1 < batch["masked_tokens"].sum() / eligible.sum() < 0.35


def test_warmup_masks_a_ratio_of_each_images_visual_tokens_whole_and_keeps_their_patches_as_targets(
    tiny_backbone: Backbone, sized_rows: list[Row]
) -> None:
    per_token = tiny_backbone.geometry.patches_per_token
    batch = warmup_collator(tiny_backbone)(numbered(sized_rows[:-1]))
    tokens_per_image = (batch["image_grid_thw"].prod(dim=1) // per_token).tolist()
    assert tokens_per_image == [4, 6, 16, 3]
    masked = batch["masked_patches"]
    of_tokens = masked.view(-1, per_token)
    assert torch.equal(of_tokens.all(dim=1), of_tokens.any(dim=1))
    counts = [image.sum().item() for image in of_tokens[:, 0].split(tokens_per_image)]
    assert counts == [round(0.5 * count) for count in tokens_per_image]
    pixel_values = render_items(tiny_backbone.processor, [joined(row) for row in sized_rows[:-1]])["pixel_values"]
    assert torch.equal(batch["target_patches"], pixel_values[masked])
    assert torch.equal(batch["pixel_values"][~masked], pixel_values[~masked])
    assert (batch["pixel_values"][masked] != pixel_values[masked]).any(dim=1).all()


@COLLATORS
def test_masking_depends_only_on_the_row_its_draw_and_the_seed(
    make: Make, tiny_backbone: Backbone, sized_rows: list[Row]
) -> None:
    collator, examples = make(tiny_backbone), numbered(sized_rows)
    torch.manual_seed(1)
    together = collator(examples)
    assert not together["attention_mask"].all(), "the rows differ in length, so that some are padded"
    torch.manual_seed(2)
    alone = [collator([example]) for example in examples]
    for number, batch in enumerate(alone):
        length = batch["input_ids"].shape[1]
        assert torch.equal(batch["masked_tokens"][0], together["masked_tokens"][number, :length])
    for name in ("target_ids", "pixel_values"):
        assert torch.equal(torch.cat([batch[name] for batch in alone]), together[name])
    redrawn = [
        collator([(Draw(draw.row + row, epoch), of) for draw, of in examples]) for row, epoch in ((9, 0), (0, 1))
    ]
    for other in (*redrawn, replace(collator, seed=1)(examples)):
        assert not torch.equal(together["masked_tokens"], other["masked_tokens"])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7, 1.0])
def test_the_bridge_masks_exactly_its_ratio_of_block_b(
    tiny_backbone: Backbone, scene_rows: list[Row], ratio: float
) -> None:
    query = Item(text="a small ring")
    rows = [*scene_rows[:6], row_of(query, "red"), row_of(query, "a small red ring at")]
    batch = bridge_collator(tiny_backbone, ratio)(numbered(rows))
    is_b = batch["blocks"] == Block.B
    assert_only_masked(batch, is_b, tiny_backbone.processor)
    assert batch["masked_tokens"].sum(1).tolist() == [max(1, round(ratio * of)) for of in is_b.sum(1).tolist()]


def test_a_bridge_row_is_block_a_one_eos_and_block_b(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    processor = tiny_backbone.processor
    instructed = row_of(Item(text="find the image: ", images=(scene_rows[0].image,)), "small red ring")
    rows = [scene_rows[1], instructed, row_of(Item(text="blue cross, white background"), "a blue cross on white")]
    batch = bridge_collator(tiny_backbone)(numbered(rows))
    input_ids = originals(batch)
    assert len(batch["attention_mask"].sum(dim=1).unique()) > 1
    for index, row in enumerate(rows):
        block_a = render_items(processor, [row.query])
        block_b = processor.tokenizer(row.positive.text, add_special_tokens=False)["input_ids"]
        count = block_a["input_ids"].shape[1]
        padding = input_ids.shape[1] - count - len(block_b)
        layout = [Block.A] * (count - 1) + [Block.EOS] + [Block.B] * len(block_b) + [Block.PAD] * padding
        assert batch["blocks"][index].tolist() == layout
        pads = [processor.tokenizer.pad_token_id] * padding
        assert input_ids[index].tolist() == [*block_a["input_ids"][0].tolist(), *block_b, *pads]
        token_types = [*block_a["mm_token_type_ids"][0].tolist(), *[0] * (len(block_b) + padding)]
        assert batch["mm_token_type_ids"][index].tolist() == token_types
    assert torch.equal(input_ids == processor.tokenizer.eos_token_id, batch["blocks"] == Block.EOS)
    assert torch.equal(batch["attention_mask"].bool(), batch["blocks"] != Block.PAD)


@pytest.mark.parametrize(("instruction", "caption"), [(LONG_TEXT, "red ring"), (None, LONG_TEXT), (LONG_TEXT,) * 2])
@COLLATORS
def test_truncation_cuts_text_and_never_eos_or_a_visual_token(
    make: Make, tiny_backbone: Backbone, sized_rows: list[Row], instruction: str | None, caption: str
) -> None:
    tokenizer = tiny_backbone.processor.tokenizer
    assert len(tokenizer(LONG_TEXT)["input_ids"]) > tokenizer.model_max_length
    row = row_of(Item(text=instruction, images=(sized_rows[2].image,)), caption)
    batch = make(tiny_backbone)(numbered([row]))
    assert batch["input_ids"].shape[1] == tokenizer.model_max_length
    assert (batch["mm_token_type_ids"] == 1).sum() == 16
    eos = originals(batch)[0] == tokenizer.eos_token_id
    if "blocks" in batch:
        assert torch.equal(eos, batch["blocks"][0] == Block.EOS)
        assert (batch["blocks"] == Block.B).any()
    else:
        assert eos.nonzero().tolist() == [[tokenizer.model_max_length - 1]]


@pytest.mark.parametrize("room", [8, 12, 48])
def test_a_long_block_b_leaves_the_largest_allowed_image_whole(
    tiny_backbone_path: Path, sized_rows: list[Row], room: int
) -> None:
    largest = 24
    longest_panorama = math.isqrt(200 * largest)
    max_length = longest_panorama + room
    processor = load_backbone(str(tiny_backbone_path), max_length=max_length, max_pixels=largest * 28**2).processor
    image = Item(images=(sized_rows[-1].image,))
    batch = BridgeCollator(processor, seed=0)(numbered([row_of(image, LONG_TEXT)]))
    assert (batch["mm_token_type_ids"] == 1).sum() == largest
    in_block_a = torch.isin(batch["blocks"], torch.tensor([Block.A, Block.EOS]))
    assert batch["input_ids"][in_block_a].tolist() == render_items(processor, [image])["input_ids"][0].tolist()
    assert (batch["blocks"] == Block.B).any()
    assert batch["input_ids"].shape[1] <= max_length


A, B = Path("a.png"), Path("b.png")


@pytest.mark.parametrize(
    ("query", "positive", "expected"),
    [
        (Item(images=(A,)), Item(text="red ring"), (Item(images=(A,)), "red ring")),
        (Item(text="red ring"), Item(images=(A,)), (Item(images=(A,)), "red ring")),
        (Item(text="a question"), Item(text="an answer"), (Item(text="a question"), "an answer")),
        (
            Item(images=(A,)),
            Item(text="red ring on white", images=(B,)),
            (Item(text="red ring", images=(B,)), "on white"),
        ),
        (
            Item(text="red ring on white", images=(B,)),
            Item(images=(A,)),
            (Item(text="red ring", images=(B,)), "on white"),
        ),
    ],
)
def test_block_b_is_a_side_of_only_text_or_half_of_one(query: Item, positive: Item, expected: tuple[Item, str]) -> None:
    assert split_blocks(Row(query, positive, source="")) == expected


@pytest.mark.parametrize("positive", [Item(images=(A,)), Item(text="red", images=(A,)), Item(text=" ")])
def test_a_row_without_a_block_b_is_an_error_that_names_it(positive: Item) -> None:
    with pytest.raises(CocoaError, match=r"pairs\.jsonl, line 17: the row has no block B"):
        split_blocks(Row(query=Item(images=(A,)), positive=positive, source="pairs.jsonl, line 17"))


def test_special_tokens_of_block_b_are_never_masked(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    row = row_of(scene_rows[0].query, "red <|im_end|> ring <|mask|> on white")
    batch = bridge_collator(tiny_backbone, mask_ratio=1.0)(numbered([row]))
    kept = originals(batch)[(batch["blocks"] == Block.B) & ~batch["masked_tokens"]]
    assert tiny_backbone.processor.tokenizer.convert_ids_to_tokens(kept) == ["<|im_end|>", "<|mask|>"]
