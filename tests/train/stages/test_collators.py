import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from PIL import Image
from torch import BoolTensor
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.train.data.rows import Draw, numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.bridge.collator import BridgeCollator, split_blocks
from cocoa_embed.train.stages.masking import row_generators
from cocoa_embed.train.stages.rendering import joined, render_items, text_tokens
from cocoa_embed.train.stages.warmup.collator import WarmupCollator

SIZES = ((56, 56), (84, 56), (112, 112), (28, 84), (168, 112))
"""Image sizes of 4, 6, 16, 3 and 24 visual tokens of 28 x 28 pixels; the last is scaled down to MAX_PIXELS."""

LONG_TEXT = "large red circle at top left and small blue ring at bottom right on white " * 20

Collator: TypeAlias = Callable[[list[tuple[int, Row]]], Batch]


@pytest.fixture
def processor(tiny_backbone: Backbone) -> ProcessorMixin:
    return tiny_backbone.processor


@pytest.fixture
def warmup_collator(tiny_backbone: Backbone) -> WarmupCollator:
    return WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)


@pytest.fixture
def bridge_collator(processor: ProcessorMixin) -> BridgeCollator:
    return BridgeCollator(processor, seed=0)


@pytest.fixture
def sized_rows(tmp_path: Path) -> list[Row]:
    """Rows with images of different sizes, all of noise, so that no two patches are alike."""
    rows = []
    for number, (width, height) in enumerate(SIZES):
        pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
        rows.append(image_row(path, "small red ring at top left"))
    return rows


def image_row(image: Path, caption: str, instruction: str | None = None) -> Row:
    return Row(query=Item(text=instruction, image=image), positive=Item(text=caption), source="rows.jsonl, line 1")


def text_row(query: str, positive: str) -> Row:
    return Row(query=Item(text=query), positive=Item(text=positive), source="rows.jsonl, line 2")


def same(first: Batch, second: Batch) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def originals(batch: Batch) -> torch.Tensor:
    """Return the token ids as they were before any was masked."""
    input_ids = batch["input_ids"].clone()
    input_ids[batch["masked_tokens"]] = batch["target_ids"]
    return input_ids


def assert_masking_is_honest(batch: Batch, eligible: BoolTensor, processor: ProcessorMixin) -> None:
    masked = batch["masked_tokens"]
    assert masked.any(dim=1).all()
    assert not (masked & ~eligible).any()
    assert (batch["input_ids"][masked] == processor.tokenizer.mask_token_id).all()
    assert (batch["input_ids"][~masked] != processor.tokenizer.mask_token_id).all()
    assert len(batch["target_ids"]) == masked.sum()


def test_text_tokens_are_ordinary_words_alone(processor: ProcessorMixin, scene_rows: list[Row]) -> None:
    rows = [Item(text="small red ring"), joined(scene_rows[0])]
    batch = render_items(processor, rows)
    found = text_tokens(batch, processor)
    assert (batch["attention_mask"] == 0).any()
    assert (batch["mm_token_type_ids"] == 1).any()
    words = [processor.tokenizer.decode(ids[where]) for ids, where in zip(batch["input_ids"], found, strict=True)]
    without_first = processor.tokenizer.decode(processor.tokenizer("small red ring")["input_ids"][1:-1])
    assert words == [without_first, scene_rows[0].positive.text]


def test_warmup_masks_text_behind_the_mask_token_and_keeps_it_as_targets(
    warmup_collator: WarmupCollator, processor: ProcessorMixin, scene_rows: list[Row]
) -> None:
    batch = warmup_collator(numbered(scene_rows))
    clean = render_items(processor, [joined(row) for row in scene_rows])
    assert_masking_is_honest(batch, text_tokens(clean, processor), processor)
    assert torch.equal(originals(batch), clean["input_ids"])
    assert not (batch["masked_tokens"] & (clean["mm_token_type_ids"] != 0)).any()
    ratio = batch["masked_tokens"].sum() / text_tokens(clean, processor).sum()
    assert 0.1 < ratio < 0.35


def test_warmup_masks_whole_visual_tokens_a_ratio_of_each_image(
    warmup_collator: WarmupCollator, tiny_backbone: Backbone, sized_rows: list[Row]
) -> None:
    per_token = tiny_backbone.geometry.patches_per_token
    batch = warmup_collator(numbered(sized_rows[:-1]))
    tokens_per_image = (batch["image_grid_thw"].prod(dim=1) // per_token).tolist()
    assert tokens_per_image == [width * height // 28**2 for width, height in SIZES[:-1]]
    masked = batch["masked_patches"].view(-1, per_token)
    assert torch.equal(masked.all(dim=1), masked.any(dim=1))
    counts = [image.sum().item() for image in masked[:, 0].split(tokens_per_image)]
    assert counts == [round(0.5 * count) for count in tokens_per_image]


def test_the_target_patches_are_the_processors_own_pixel_rows(
    warmup_collator: WarmupCollator, processor: ProcessorMixin, sized_rows: list[Row]
) -> None:
    batch = warmup_collator(numbered(sized_rows))
    pixel_values = render_items(processor, [joined(row) for row in sized_rows])["pixel_values"]
    masked = batch["masked_patches"]
    assert torch.equal(batch["target_patches"], pixel_values[masked])
    assert torch.equal(batch["pixel_values"][~masked], pixel_values[~masked])
    assert (batch["pixel_values"][masked] != pixel_values[masked]).any(dim=1).all()


@pytest.mark.parametrize("stage", ["warmup_collator", "bridge_collator"])
def test_masking_depends_on_the_rows_and_the_seed_alone(
    stage: str, scene_rows: list[Row], request: pytest.FixtureRequest
) -> None:
    collator: Collator = request.getfixturevalue(stage)
    examples = numbered(scene_rows[:6])
    torch.manual_seed(1)
    first = collator(examples)
    torch.manual_seed(2)
    assert same(first, collator(examples))
    renumbered = collator([(Draw(draw.row + 100), row) for draw, row in examples])
    assert not torch.equal(first["masked_tokens"], renumbered["masked_tokens"])
    object.__setattr__(collator, "seed", 1)
    assert not torch.equal(first["masked_tokens"], collator(examples)["masked_tokens"])


def test_a_rows_generator_tells_seeds_rows_and_epochs_apart() -> None:
    def first_draws(seed: int, draw: Draw) -> tuple[float, ...]:
        (generator,) = row_generators(seed, [draw])
        return tuple(torch.rand(4, generator=generator).tolist())

    drawn = [first_draws(*of) for of in ((0, Draw(1)), (1, Draw(1)), (0, Draw(2)), (0, Draw(1, 1)), (1, Draw(0)))]
    assert len(set(drawn)) == len(drawn)
    assert first_draws(0, Draw(1)) == drawn[0]


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_what_is_masked_of_a_row_depends_on_no_other_row(
    stage: str, warmup_collator: WarmupCollator, bridge_collator: BridgeCollator, sized_rows: list[Row]
) -> None:
    collator = warmup_collator if stage == "warmup" else bridge_collator
    rows = numbered([row for row in sized_rows if row.positive.text])
    together = collator(rows)
    assert not together["attention_mask"].all(), "the rows differ in length, so that some are padded"
    targets, patches = [], []
    for number, example in enumerate(rows):
        alone = collator([example])
        length = alone["input_ids"].shape[1]
        assert torch.equal(alone["masked_tokens"][0], together["masked_tokens"][number, :length])
        targets.append(alone["target_ids"])
        patches.append(alone.get("pixel_values", torch.empty(0)))
    assert torch.equal(torch.cat(targets), together["target_ids"])
    assert torch.equal(torch.cat([patch for patch in patches if len(patch)]), together["pixel_values"])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7, 1.0])
def test_the_bridge_masks_exactly_its_ratio_of_block_b(
    processor: ProcessorMixin, scene_rows: list[Row], ratio: float
) -> None:
    rows = [*scene_rows[:6], text_row("a small ring", "red"), text_row("a small ring", "a small red ring at")]
    batch = BridgeCollator(processor, seed=0, mask_ratio=ratio)(numbered(rows))
    is_b = batch["blocks"] == Block.B
    assert_masking_is_honest(batch, is_b, processor)
    for masked, of in zip(batch["masked_tokens"].sum(1).tolist(), is_b.sum(1).tolist(), strict=True):
        assert masked == max(1, round(ratio * of))


def test_a_bridge_row_is_block_a_one_eos_and_block_b(
    bridge_collator: BridgeCollator, processor: ProcessorMixin, scene_rows: list[Row]
) -> None:
    instructed = image_row(scene_rows[0].query.image, "small red ring", instruction="find the image: ")
    rows = [scene_rows[1], instructed, text_row("blue cross, white background", "a blue cross on white")]
    batch = bridge_collator(numbered(rows))
    input_ids = originals(batch)
    assert len(batch["attention_mask"].sum(dim=1).unique()) > 1
    for index, row in enumerate(rows):
        block_a = render_items(processor, [row.query])
        block_b = processor.tokenizer(row.positive.text, add_special_tokens=False)["input_ids"]
        count_a = block_a["input_ids"].shape[1]
        padding = input_ids.shape[1] - count_a - len(block_b)
        layout = [Block.A] * (count_a - 1) + [Block.EOS] + [Block.B] * len(block_b) + [Block.PAD] * padding
        assert batch["blocks"][index].tolist() == layout
        assert input_ids[index, :count_a].tolist() == block_a["input_ids"][0].tolist()
        assert input_ids[index, count_a : count_a + len(block_b)].tolist() == block_b
        assert input_ids[index, count_a + len(block_b) :].eq(processor.tokenizer.pad_token_id).all()
        assert batch["mm_token_type_ids"][index, :count_a].tolist() == block_a["mm_token_type_ids"][0].tolist()
        assert not batch["mm_token_type_ids"][index, count_a:].any()
    eos = input_ids == processor.tokenizer.eos_token_id
    assert torch.equal(eos, batch["blocks"] == Block.EOS)
    assert torch.equal(batch["attention_mask"].bool(), batch["blocks"] != Block.PAD)


def visual_tokens(batch: Batch, processor: ProcessorMixin) -> int:
    merged = batch["image_grid_thw"].prod() // processor.image_processor.merge_size**2
    assert (batch["mm_token_type_ids"] == 1).sum() == merged
    return int(merged)


@pytest.mark.parametrize(("instruction", "caption"), [(LONG_TEXT, "red ring"), (None, LONG_TEXT), (LONG_TEXT,) * 2])
def test_bridge_truncation_takes_text_and_never_eos_or_a_visual_token(
    bridge_collator: BridgeCollator,
    processor: ProcessorMixin,
    sized_rows: list[Row],
    instruction: str | None,
    caption: str,
) -> None:
    max_length = processor.tokenizer.model_max_length
    assert len(processor.tokenizer(LONG_TEXT)["input_ids"]) > max_length
    row = image_row(sized_rows[2].query.image, caption, instruction)
    batch = bridge_collator(numbered([row]))
    assert batch["input_ids"].shape[1] == max_length
    assert visual_tokens(batch, processor) == 16
    blocks = batch["blocks"][0]
    assert originals(batch)[0][blocks == Block.EOS].tolist() == [processor.tokenizer.eos_token_id]
    assert (blocks == Block.B).any()
    assert (blocks == Block.A).sum() > 16


@pytest.mark.parametrize("room", [8, 12, 48])
def test_a_long_block_b_leaves_the_largest_allowed_image_whole(
    tiny_backbone_path: Path, sized_rows: list[Row], room: int
) -> None:
    largest = 24
    longest_panorama = math.isqrt(200 * largest)
    max_length = longest_panorama + room
    processor = load_backbone(str(tiny_backbone_path), max_length=max_length, max_pixels=largest * 28**2).processor
    image = Item(image=sized_rows[-1].image)
    batch = BridgeCollator(processor, seed=0)(numbered([Row(query=image, positive=Item(text=LONG_TEXT), source="")]))
    assert visual_tokens(batch, processor) == largest
    in_block_a = torch.isin(batch["blocks"], torch.tensor([Block.A, Block.EOS]))
    assert batch["input_ids"][in_block_a].tolist() == render_items(processor, [image])["input_ids"][0].tolist()
    assert (batch["blocks"] == Block.B).any()
    assert batch["input_ids"].shape[1] <= max_length


def test_warmup_truncation_keeps_eos_and_every_visual_token(
    warmup_collator: WarmupCollator, processor: ProcessorMixin, sized_rows: list[Row]
) -> None:
    batch = warmup_collator(numbered([image_row(sized_rows[2].query.image, LONG_TEXT)]))
    assert batch["input_ids"].shape[1] == processor.tokenizer.model_max_length
    assert visual_tokens(batch, processor) == 16
    assert batch["input_ids"][0, -1] == processor.tokenizer.eos_token_id


A, B = Path("a.png"), Path("b.png")


@pytest.mark.parametrize(
    ("query", "positive", "expected"),
    [
        (Item(image=A), Item(text="red ring"), (Item(image=A), "red ring")),
        (Item(text="red ring"), Item(image=A), (Item(image=A), "red ring")),
        (Item(text="a question"), Item(text="an answer"), (Item(text="a question"), "an answer")),
        (Item(image=A), Item(text="red ring on white", image=B), (Item(text="red ring", image=B), "on white")),
        (Item(text="red ring on white", image=B), Item(image=A), (Item(text="red ring", image=B), "on white")),
    ],
)
def test_block_b_is_a_side_of_only_text_or_half_of_one(query: Item, positive: Item, expected: tuple[Item, str]) -> None:
    assert split_blocks(Row(query, positive, source="")) == expected


def test_special_tokens_of_block_b_are_never_masked(
    bridge_collator: BridgeCollator, processor: ProcessorMixin, scene_rows: list[Row]
) -> None:
    text = "red <|im_end|> ring <|mask|> on white"
    row = Row(query=Item(image=scene_rows[0].image), positive=Item(text=text), source="")
    batch = replace(bridge_collator, mask_ratio=1.0)(numbered([row]))
    special = torch.isin(batch["input_ids"], torch.tensor(sorted(processor.tokenizer.added_tokens_decoder)))
    in_b = batch["blocks"] == Block.B
    kept = originals(batch)[in_b & ~batch["masked_tokens"]]
    assert processor.tokenizer.convert_ids_to_tokens(kept) == ["<|im_end|>", "<|mask|>"]
    assert special[in_b].all(), "everything else is behind the mask token"


@pytest.mark.parametrize("text", [None, "red", " "])
def test_a_row_without_a_block_b_is_an_error_that_names_it(
    bridge_collator: BridgeCollator, scene_rows: list[Row], text: str | None
) -> None:
    image = scene_rows[0].image
    sides = (Item(image=image), Item(text=text, image=image if text != " " else None))
    row = Row(query=sides[0], positive=sides[1], source="pairs.jsonl, line 17")
    with pytest.raises(CocoaError, match=r"pairs\.jsonl, line 17: the row has no block B"):
        bridge_collator(numbered([scene_rows[1], row]))
