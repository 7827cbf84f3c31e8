"""One collator for each reconstruction stage: rows in, a corrupted batch with its targets out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from torch import Generator, Tensor
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import PatchGeometry
from cocoa_embed.model.template import render
from cocoa_embed.train.data.rows import Draw, load_row_image
from cocoa_embed.train.settings import BridgeSection, StageSection, WarmupSection
from cocoa_embed.train.stages.masking import PatchFill, fill_patches, hide_each, hide_share, hide_visual_tokens

NO_BLOCK_B = (
    "the row has no block B for the bridge stage; one of its sides must be a text without image, or have a text of two "
    "words or more."
)

Batch = dict[str, Tensor]
"""Named model inputs and targets; what a batch does not have (images, say) is left out."""


def row_generators(seed: int, draws: Sequence[Draw]) -> list[Generator]:
    """Return a generator for each row, of the seed and its draw alone: no batch, worker or device changes it."""
    states = [np.random.SeedSequence([seed, *draw]).generate_state(1, dtype=np.uint64)[0] for draw in draws]
    return [torch.Generator().manual_seed(int(state) >> 1) for state in states]


def render_items(
    processor: ProcessorMixin, items: Sequence[Item], *, prompt: str = "", max_length: int | None = None
) -> Batch:
    """Turn items into model inputs ``[vision][prompt][text]<EOS>``, right-padded, cut to ``max_length`` tokens.

    :returns: ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (int64 ``[B, L]``) and, where there are images,
        ``pixel_values`` (float ``[patches, patch_width]``) and ``image_grid_thw`` (int64 ``[images, 3]``).
    """
    images = [load_row_image(item.image) for item in items if item.image is not None]
    return dict(
        processor(
            images=images or None,
            text=[render(text=item.text, has_image=item.image is not None, prompt=prompt) for item in items],
            padding=True,
            truncation=True,
            max_length=max_length or processor.tokenizer.model_max_length,
            return_tensors="pt",
        )
    )


def text_tokens(batch: Batch, processor: ProcessorMixin) -> Tensor:
    """Return the positions of ordinary text tokens, bool ``[B, L]``: no padding, special or visual token.

    A row's first position is left out too: masked next-token prediction has no state before it.
    """
    is_text = batch["attention_mask"].bool() & (batch["mm_token_type_ids"] == 0)
    is_text &= ~is_special(batch["input_ids"], processor)
    is_text[:, 0] = False
    return is_text


def is_special(input_ids: Tensor, processor: ProcessorMixin) -> Tensor:
    """Return which tokens are none of the text's own (padding, ``<EOS>``, visual tokens), bool of the same shape."""
    return torch.isin(input_ids, torch.tensor(sorted(processor.tokenizer.added_tokens_decoder)))


def mask_tokens(batch: Batch, hidden: Tensor, mask_token_id: int) -> Batch:
    """Replace hidden tokens by the mask token; add ``hidden_tokens`` ``[B, L]`` and ``target_ids`` ``[hidden]``."""
    return {
        **batch,
        "input_ids": batch["input_ids"].masked_fill(hidden, mask_token_id),
        "hidden_tokens": hidden,
        "target_ids": batch["input_ids"][hidden],
    }


@dataclass(frozen=True)
class WarmupCollator:
    """Stage 1: image and caption in one sequence, some text tokens and some visual tokens hidden.

    Adds to ``render_items``: ``hidden_tokens`` (bool ``[B, L]``), ``target_ids`` (int64 ``[hidden tokens]``),
    ``hidden_patches`` (bool ``[patches]``) and ``target_patches`` (float ``[hidden patches, patch_width]``).
    """

    processor: ProcessorMixin
    geometry: PatchGeometry
    seed: int
    text_mask_ratio: float = 0.2
    image_mask_ratio: float = 0.5
    patch_fill: PatchFill = "noise"

    def __call__(self, examples: list[tuple[Draw, Row]]) -> Batch:
        """Collate rows with their draws."""
        generators = row_generators(self.seed, [draw for draw, _ in examples])
        batch = render_items(self.processor, [joined(row) for _, row in examples])
        eligible = text_tokens(batch, self.processor)
        hidden = hide_each(eligible, self.text_mask_ratio, generators)
        batch = mask_tokens(batch, hidden, self.processor.tokenizer.mask_token_id)
        if "pixel_values" not in batch:
            no_patches = torch.empty(0, self.geometry.patch_width)
            return {**batch, "hidden_patches": torch.empty(0, dtype=torch.bool), "target_patches": no_patches}
        pictured = [row.image is not None for _, row in examples]
        return {**batch, **self._hide_patches(batch, list(compress(generators, pictured)))}

    def _hide_patches(self, batch: Batch, generators: Sequence[Generator]) -> Batch:
        per_token = self.geometry.patches_per_token
        patches = batch["image_grid_thw"].prod(dim=1)
        hidden_visual = hide_visual_tokens(patches // per_token, self.image_mask_ratio, generators)
        hidden_patches = hidden_visual.repeat_interleave(per_token)
        return {
            "pixel_values": fill_patches(
                batch["pixel_values"], hidden_patches, self.patch_fill, patches.tolist(), generators
            ),
            "hidden_patches": hidden_patches,
            "target_patches": batch["pixel_values"][hidden_patches],
        }


def joined(row: Row) -> Item:
    """Return the row as one item: its image and its texts, the query's first."""
    texts = [item.text for item in (row.query, row.positive) if item.text is not None]
    return Item(text=" ".join(texts) or None, image=row.image)


@dataclass(frozen=True)
class BridgeCollator:
    """Stage 2: ``[block A] <EOS> [block B]``, a share of block B's tokens hidden.

    Adds to ``render_items``: ``blocks`` (``Block``, int64 ``[B, L]``),
    ``hidden_tokens`` (bool ``[B, L]``) and ``target_ids`` (int64 ``[hidden tokens]``).
    """

    processor: ProcessorMixin
    seed: int
    mask_ratio: float = 0.7

    def __call__(self, examples: list[tuple[Draw, Row]]) -> Batch:
        """Collate rows with their draws.

        :raises CocoaError: For a row that has no text for block B, naming it.
        """
        generators = row_generators(self.seed, [draw for draw, _ in examples])
        tokenizer = self.processor.tokenizer
        max_length = tokenizer.model_max_length
        pairs = [split_blocks(row) for _, row in examples]
        block_a = render_items(self.processor, [item for item, _ in pairs])
        block_b = tokenizer(
            [text for _, text in pairs], add_special_tokens=False, truncation=True, max_length=max_length
        )
        joined_blocks = [
            join_blocks(ids[keep], kinds[keep], is_text[keep], torch.tensor(tail, dtype=torch.long), max_length)
            for ids, kinds, is_text, keep, tail in zip(
                block_a["input_ids"],
                block_a["mm_token_type_ids"],
                text_tokens(block_a, self.processor),
                block_a["attention_mask"].bool(),
                block_b["input_ids"],
                strict=True,
            )
        ]
        ids, kinds, blocks = zip(*joined_blocks, strict=True)
        padded_blocks = _pad(blocks, Block.PAD)
        batch = {
            **block_a,
            "input_ids": _pad(ids, tokenizer.pad_token_id),
            "mm_token_type_ids": _pad(kinds, 0),
            "attention_mask": (padded_blocks != Block.PAD).long(),
            "blocks": padded_blocks,
        }
        hidden = self._hide_in_block_b(batch, generators)
        return mask_tokens(batch, hidden, tokenizer.mask_token_id)

    def _hide_in_block_b(self, batch: Batch, generators: Sequence[Generator]) -> Tensor:
        """Hide a share of each block B, whatever block A is: bool ``[B, L]``."""
        in_b = batch["blocks"] == Block.B
        return hide_share(in_b & ~is_special(batch["input_ids"], self.processor), self.mask_ratio, generators)


def split_blocks(row: Row) -> tuple[Item, str]:
    """Return what goes into block A and the text of block B: the side that is text alone, the positive first.

    Where neither side is, block B is the second half of the words that stand beside an image, the positive's first.

    :raises CocoaError: If there is no text to split, naming the row.
    """
    for block_a, block_b in ((row.query, row.positive), (row.positive, row.query)):
        if block_b.image is None and block_b.text and block_b.text.strip():
            return block_a, block_b.text
    for item in (row.positive, row.query):
        words = (item.text or "").split()
        if len(words) > 1:
            middle = len(words) // 2
            return Item(text=" ".join(words[:middle]), image=item.image), " ".join(words[middle:])
    raise CocoaError(f"{row.source}: {NO_BLOCK_B}")


def lacks_block_b(row: Row) -> str | None:
    """Say why a row is of no use to the bridge stage; None where it is."""
    try:
        split_blocks(row)
    except CocoaError:
        return NO_BLOCK_B
    return None


def join_blocks(
    input_ids: Tensor, token_types: Tensor, is_text: Tensor, tail: Tensor, max_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Append block B's tokens after a row's ``<EOS>``, within ``max_length`` tokens.

    Where both do not fit, block A's text gives way until block B has a quarter of the length; visual tokens and
    ``<EOS>`` stay. Block B is cut to what is left.

    :param input_ids: Block A and ``<EOS>``, int64 ``[length]``.
    :param token_types: Its ``mm_token_type_ids``, int64 ``[length]``.
    :param is_text: Its ordinary text tokens, bool ``[length]``.
    :param tail: Block B, int64 ``[tokens]``.
    :returns: ids, token types and ``Block`` of every position, int64 ``[joined length]``.
    """
    excess = len(input_ids) + min(len(tail), max_length // 4) - max_length
    text_positions = is_text.nonzero().flatten()
    keep = torch.ones_like(is_text)
    keep[text_positions[len(text_positions) - max(0, min(excess, len(text_positions))) :]] = False
    input_ids, token_types = input_ids[keep], token_types[keep]
    tail = tail[: max_length - len(input_ids)]
    blocks = torch.tensor([Block.A] * (len(input_ids) - 1) + [Block.EOS] + [Block.B] * len(tail))
    return torch.cat([input_ids, tail]), torch.cat([token_types, torch.zeros_like(tail)]), blocks


def _pad(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def reconstruction_collator(
    section: StageSection, processor: ProcessorMixin, geometry: PatchGeometry, *, seed: int
) -> WarmupCollator | BridgeCollator:
    """Return the collator of a reconstruction stage, by its section of a recipe.

    :raises TypeError: For another stage's section.
    """
    if isinstance(section, WarmupSection):
        return WarmupCollator(
            processor,
            geometry,
            seed=seed,
            text_mask_ratio=section.text_mask_ratio,
            image_mask_ratio=section.image_mask_ratio,
            patch_fill=section.patch_fill,
        )
    if isinstance(section, BridgeSection):
        return BridgeCollator(processor, seed=seed, mask_ratio=section.mask_ratio)
    raise TypeError(f"no reconstruction is asked for by a {type(section).__name__}")
