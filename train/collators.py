"""One collator for each reconstruction stage: rows in, a corrupted batch with its targets out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from transformers import ProcessorMixin

from cocoa_embed.attention import Block
from cocoa_embed.backbone import PatchGeometry
from cocoa_embed.errors import CocoaError
from cocoa_embed.images import load_image
from cocoa_embed.template import render
from cocoa_embed.train.corruption import PatchFill, fill_patches, hide_each, hide_share, hide_visual_tokens
from cocoa_embed.train.data import Item, Row

Batch = dict[str, Tensor]
"""Named model inputs and targets; what a batch does not have (images, say) is left out."""


def batch_generator(seed: int, indices: Sequence[int]) -> Generator:
    """Return a generator that depends on the seed and the batch's rows alone, not on the worker that draws them."""
    state = np.random.SeedSequence([seed, *indices]).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def render_items(processor: ProcessorMixin, items: Sequence[Item], *, max_length: int | None = None) -> Batch:
    """Turn items into model inputs ``[vision][text]<EOS>``, right-padded, texts truncated to ``max_length`` tokens.

    :returns: ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (int64 ``[B, L]``) and, where there are images,
        ``pixel_values`` (float ``[patches, patch_width]``) and ``image_grid_thw`` (int64 ``[images, 3]``).
    """
    images = [load_image(item.image) for item in items if item.image is not None]
    return dict(
        processor(
            images=images or None,
            text=[render(text=item.text, has_image=item.image is not None) for item in items],
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
    special = torch.tensor(sorted(processor.tokenizer.added_tokens_decoder))
    is_text = batch["attention_mask"].bool() & (batch["mm_token_type_ids"] == 0)
    is_text &= ~torch.isin(batch["input_ids"], special)
    is_text[:, 0] = False
    return is_text


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

    Adds to :func:`render_items`: ``hidden_tokens`` (bool ``[B, L]``), ``target_ids`` (int64 ``[hidden tokens]``),
    ``hidden_patches`` (bool ``[patches]``) and ``target_patches`` (float ``[hidden patches, patch_width]``).
    """

    processor: ProcessorMixin
    geometry: PatchGeometry
    seed: int
    text_mask_ratio: float = 0.2
    image_mask_ratio: float = 0.5
    patch_fill: PatchFill = "noise"

    def __call__(self, examples: list[tuple[int, Row]]) -> Batch:
        """Collate ``(index, row)`` examples."""
        generator = batch_generator(self.seed, [index for index, _ in examples])
        batch = render_items(self.processor, [joined(row) for _, row in examples])
        eligible = text_tokens(batch, self.processor)
        hidden = hide_each(eligible, self.text_mask_ratio, generator)
        batch = mask_tokens(batch, hidden, self.processor.tokenizer.mask_token_id)
        if "pixel_values" in batch:
            batch |= self._hide_patches(batch, generator)
        return batch

    def _hide_patches(self, batch: Batch, generator: Generator) -> Batch:
        per_token = self.geometry.patches_per_token
        tokens_per_image = batch["image_grid_thw"].prod(dim=1) // per_token
        hidden_visual = hide_visual_tokens(tokens_per_image, self.image_mask_ratio, generator)
        hidden_patches = hidden_visual.repeat_interleave(per_token)
        return {
            "pixel_values": fill_patches(batch["pixel_values"], hidden_patches, self.patch_fill, generator),
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

    Adds to :func:`render_items`: ``blocks`` (:class:`~cocoa_embed.attention.Block`, int64 ``[B, L]``),
    ``hidden_tokens`` (bool ``[B, L]``) and ``target_ids`` (int64 ``[hidden tokens]``).
    """

    processor: ProcessorMixin
    seed: int
    mask_ratio: float = 0.7

    def __call__(self, examples: list[tuple[int, Row]]) -> Batch:
        """Collate ``(index, row)`` examples.

        :raises CocoaError: For a row that has no text for block B, naming it.
        """
        generator = batch_generator(self.seed, [index for index, _ in examples])
        tokenizer = self.processor.tokenizer
        pairs = [split_blocks(row) for _, row in examples]
        tails = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in pairs]
        max_length = tokenizer.model_max_length
        room_for_b = min(max(map(len, tails)), max_length // 4)
        block_a = render_items(self.processor, [item for item, _ in pairs], max_length=max_length - room_for_b)
        batch = append_block_b(block_a, tails, pad_token_id=tokenizer.pad_token_id, max_length=max_length)
        hidden = hide_share(batch["blocks"] == Block.B, self.mask_ratio, generator)
        return mask_tokens(batch, hidden, tokenizer.mask_token_id)


def split_blocks(row: Row) -> tuple[Item, str]:
    """Return what goes into block A and the text of block B: the side that is text alone, the positive first.

    :raises CocoaError: If neither side is text alone, naming the row.
    """
    for block_a, block_b in ((row.query, row.positive), (row.positive, row.query)):
        if block_b.image is None and block_b.text and block_b.text.strip():
            return block_a, block_b.text
    raise CocoaError(
        f"{row.source}: the row has no block B for the bridge stage; one of its sides must be a text without image."
    )


def append_block_b(block_a: Batch, tails: Sequence[Sequence[int]], *, pad_token_id: int, max_length: int) -> Batch:
    """Append block B's tokens after each row's ``<EOS>`` and pad on the right.

    :param block_a: As :func:`render_items` returns, every row ending in ``<EOS>``.
    :param tails: Token ids of block B of each row, cut to what ``max_length`` leaves.
    """
    ids, kinds, blocks = [], [], []
    for row, tail in enumerate(tails):
        length = int(block_a["attention_mask"][row].sum())
        tail_ids = torch.tensor(tail[: max_length - length], dtype=torch.long)
        ids.append(torch.cat([block_a["input_ids"][row, :length], tail_ids]))
        kinds.append(torch.cat([block_a["mm_token_type_ids"][row, :length], torch.zeros_like(tail_ids)]))
        blocks.append(torch.tensor([Block.A] * (length - 1) + [Block.EOS] + [Block.B] * len(tail_ids)))
    padded_blocks = _pad(blocks, Block.PAD)
    return {
        **block_a,
        "input_ids": _pad(ids, pad_token_id),
        "mm_token_type_ids": _pad(kinds, 0),
        "attention_mask": (padded_blocks != Block.PAD).long(),
        "blocks": padded_blocks,
    }


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
