from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import alone, bridge_collator, moca_collator, warmup_collator, warmup_settings
from table_files import EXAMPLES, example_row
from torch import Tensor
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError, RowError
from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.train.data.lengths import item_lengths
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import Draw, load_row_image, numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.bridge.collator import LONG_TEXT_WORDS, BridgeCollator, join_blocks, split_blocks
from cocoa_embed.train.stages.bridge.settings import BridgeSettings, Split
from cocoa_embed.train.stages.bridge.stage import Bridge
from cocoa_embed.train.stages.rendering import joined, render_items, text_tokens
from cocoa_embed.train.stages.warmup.stage import WarmupCollator

LONG_TEXT = "large red circle at top left and small blue ring at bottom right on white " * 20

COLLATORS = pytest.mark.parametrize("make", [warmup_collator, moca_collator, bridge_collator])
Make = Callable[[Backbone], Any]


@pytest.fixture
def processor(tiny_backbone: Backbone) -> ProcessorMixin:
    return tiny_backbone.processor


@pytest.fixture
def roomy(tiny_backbone_path: Path) -> ProcessorMixin:
    """A processor that truncates none of the examples."""
    return load_backbone(str(tiny_backbone_path), max_length=512).processor


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
    per_token = family_of(tiny_backbone.model.config).geometry.patches_per_token
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


def test_warmup_masks_instructions_less_than_all_words_of_content_and_takes_the_images_of_both_sides(
    roomy: ProcessorMixin, sized_rows: list[Row]
) -> None:
    rows = [example_row(subset, *(row.query.images[0] for row in sized_rows[:2])) for subset in EXAMPLES]
    rows.append(Row(Item("blue cross"), Item("white"), source=""))
    ratios = warmup_settings(text_mask_ratio=1.0, instruction_mask_ratio=1e-9)
    batch = WarmupCollator(roomy, 0, ratios)(numbered(rows))
    assert len(batch["image_grid_thw"]) == sum(len(row.images()) for row in rows)
    for ids, masked, row in zip(originals(batch), batch["masked_tokens"], rows, strict=True):
        content = f"{row.query.text or ''} {row.positive.text or ''}".strip()
        if not row.images():  # no state comes before the first token
            content = content.removeprefix(roomy.tokenizer.decode(ids[0])).strip()
        assert roomy.tokenizer.decode(ids[masked]).strip() == content or (not content and masked.sum() == 1)


# The blocks of the bridge

ASKED, QUESTION, GIVEN, ANSWER = "query instruction", "query", "positive instruction", "positive"
BLOCKS = {
    **dict.fromkeys(("ImageNet_1K", "HatefulMemes", "VOC2007", "SUN397"), ([ASKED], ANSWER)),
    **dict.fromkeys(("VisualNews_i2t", "MSCOCO_i2t"), ([ASKED], ANSWER)),
    "N24News": ([ASKED, ANSWER], QUESTION),
    **dict.fromkeys(
        ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"), ([ASKED, ANSWER], QUESTION)
    ),
    **dict.fromkeys(("VisDial", "VisualNews_t2i", "MSCOCO_t2i"), ([GIVEN], QUESTION)),
    **dict.fromkeys(("CIRR", "MSCOCO"), ([ASKED, GIVEN], QUESTION)),
    "WebQA": ([GIVEN, ASKED, QUESTION], ANSWER),
}
"""The texts of block A and of block B for the example of each subset; block A has all images."""


def test_the_blocks_of_every_mmeb_subset_are_images_and_instructions_around_one_content(
    roomy: ProcessorMixin, sized_rows: list[Row]
) -> None:
    images = [row.query.images[0] for row in sized_rows[:2]]
    rows = [example_row(subset, *images) for subset in BLOCKS]
    batch = BridgeCollator(roomy, seed=0)(numbered(rows))
    input_ids = originals(batch)
    assert {*BLOCKS, "NIGHTS"} == set(EXAMPLES)
    for number, row in enumerate(rows):
        texts = {
            f"{side}{part}": text
            for side, item in (("query", row.query), ("positive", row.positive))
            for part, text in ((" instruction", item.instruction), ("", item.text))
        }
        of_a, of_b = BLOCKS[row.subset]
        own = [image for image, side in zip(images, (row.query, row.positive), strict=True) if side.images]
        item = Item(text="".join(texts[part] for part in of_a), images=tuple(own))
        block_a = render_items(roomy, [item])
        block_b = roomy.tokenizer(texts[of_b], add_special_tokens=False)["input_ids"]
        count = block_a["input_ids"].shape[1]
        padding = input_ids.shape[1] - count - len(block_b)
        layout = [Block.A] * (count - 1) + [Block.EOS] + [Block.B] * len(block_b) + [Block.PAD] * padding
        assert batch["blocks"][number].tolist() == layout, row.subset
        pads = [roomy.tokenizer.pad_token_id] * padding
        assert input_ids[number].tolist() == [*block_a["input_ids"][0].tolist(), *block_b, *pads], row.subset
        token_types = [*block_a["mm_token_type_ids"][0].tolist(), *[0] * (len(block_b) + padding)]
        assert batch["mm_token_type_ids"][number].tolist() == token_types
    assert len(batch["image_grid_thw"]) == sum(len(row.images()) for row in rows)
    assert torch.equal(input_ids == roomy.tokenizer.eos_token_id, batch["blocks"] == Block.EOS)
    assert torch.equal(batch["attention_mask"].bool(), batch["blocks"] != Block.PAD)


A, B = Path("a.png"), Path("b.png")
LONG = " ".join(f"word{number}" for number in range(LONG_TEXT_WORDS))
FIRST, SECOND = (" ".join(LONG.split()[half * 16 : half * 16 + 16]) for half in (0, 1))


@pytest.mark.parametrize(
    ("query", "positive", "split", "expected"),
    [
        (Item("a ring", (A,)), Item("red hat", (B,)), "whole", (Item("a ring", (A, B)), "red hat")),
        (Item("red ring", (A,)), Item("red hat", (A,)), "whole", (Item("red hat", (A,)), "red ring")),
        (Item("red ring"), Item("ring", (A, B)), "halves", (Item("ring", (A, B)), "red ring")),
        (Item("red ring"), Item("a ring"), "halves", (Item("red ring"), "a ring")),
        (Item("ring", (), "find "), Item(LONG, (), "given "), "whole", (Item("ring", (), "find "), LONG)),
        (Item("ring", (), "find "), Item(LONG, (), "given "), "halves", (Item(FIRST, (), "given "), SECOND)),
        (Item("red ring"), Item(LONG, (A,)), "halves", (Item("red ring", (A,)), LONG)),
    ],
)
def test_block_b_is_the_longer_content_the_positives_in_ties_and_texts_or_half_of_a_long_text(
    query: Item, positive: Item, split: Split, expected: tuple[Item, str]
) -> None:
    assert split_blocks(Row(query, positive, source=""), split) == expected


def test_a_row_without_content_is_unusable_and_an_error_that_names_it(scene_rows: list[Row]) -> None:
    nothing = example_row("NIGHTS", A, B)
    rows = [*scene_rows[:2], nothing, *(example_row(subset, A, B) for subset in BLOCKS)]
    stage = alone(Bridge, BridgeSettings(steps=1, batch_size=1))
    assert stage.usable(RowTable.of(rows)).tolist() == [row != nothing for row in rows]
    with pytest.raises(RowError, match="NIGHTS, row 1: the row has no text besides its instructions"):
        split_blocks(nothing)


# Truncation and special tokens


def test_images_that_do_not_fit_into_a_sequence_are_refused(tiny_backbone: Backbone, sized_rows: list[Row]) -> None:
    images = tuple(image for row in sized_rows for image in row.query.images)
    batch = bridge_collator(tiny_backbone)(numbered([row_of(Item(images=images[:4]), "red ring")]))
    assert (batch["mm_token_type_ids"] == 1).sum() == 29
    with pytest.raises(CocoaError, match="tokens before its text, more than max_length 128; lower max_pixels"):
        render_items(tiny_backbone.processor, [Item(images=images * 3)])


@settings(max_examples=100)
@given(visual=st.integers(0, 20), text=st.integers(0, 30), tail=st.integers(1, 60), room=st.integers(2, 60))
def test_blocks_are_cut_to_the_length_and_never_the_image_or_eos(visual: int, text: int, tail: int, room: int) -> None:
    ids = torch.arange(visual + text + 1)
    kinds = (ids < visual).long()
    is_text = (ids >= visual) & (ids < visual + text)
    joined_ids, joined_kinds, blocks = join_blocks(ids, kinds, is_text, torch.full((tail,), 99), visual + room)
    assert len(joined_ids) == min(visual + text + 1 + tail, visual + room)
    kept = joined_ids[blocks != Block.B].tolist()
    assert kept == [*range(visual + len(kept) - visual - 1), visual + text], "text is cut at its end"
    assert joined_kinds.sum() == visual
    of_b = int((blocks == Block.B).sum())
    assert of_b >= min(tail, (visual + room) // 4, room - 1)
    assert of_b == tail or len(joined_ids) == visual + room


def test_special_tokens_that_a_text_mentions_are_ordinary_in_both_blocks(
    tiny_backbone: Backbone, scene_rows: list[Row]
) -> None:
    text, tokenizer = "red <|image_pad|> ring <|mask|> on <|endoftext|> white", tiny_backbone.processor.tokenizer
    image = scene_rows[0].query.images
    row = row_of(Item("a <|vision_start|><|im_end|> ring", image), text)
    batch = bridge_collator(tiny_backbone, mask_ratio=1.0)(numbered([row]))
    ids = originals(batch)
    is_b = batch["blocks"] == Block.B
    assert batch["masked_tokens"][is_b].all()
    assert tokenizer.decode(ids[is_b]).replace("< |", "<|") == text
    (plain,) = render_items(tiny_backbone.processor, [Item(images=image)])["input_ids"]
    added = [token for token in ids[0].tolist() if token in tokenizer.added_tokens_decoder]
    assert added == [token for token in plain.tolist() if token in tokenizer.added_tokens_decoder]
    joined_row = joined(row)
    (length,) = item_lengths([joined_row], tiny_backbone.processor, {image[0]: load_row_image(image[0]).size})
    assert render_items(tiny_backbone.processor, [joined_row])["input_ids"].shape == (1, length + 1)
