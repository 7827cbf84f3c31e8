"""Turn rows into model inputs, for the stages that reconstruct masked tokens and patches."""

from collections.abc import Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Item, ItemImage, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.model.template import eos_tokens, literal, render, special_tokens
from cocoa_embed.train.data.image_patches import image_patches, normalised, patch_digests
from cocoa_embed.train.loop.batch_facts import Batch

Each = TypeVar("Each")


def batched(items: Sequence[Each], size: int) -> list[list[Each]]:
    """Return the items in lists of ``size``; the last one may be shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def render_items(processor: ProcessorMixin, items: Sequence[Item], *, prompt: str = "") -> Batch:
    """Turn items into model inputs ``[vision][prompt][text]<EOS>``, right-padded, truncated to the processor's limit.

    :raises CocoaError: If the images of an item do not fit into a sequence.
    :returns: ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (int64 ``[B, L]``) and, where there are images,
        ``pixel_values`` (float ``[patches, patch_width]``), ``image_grid_thw`` (int64 ``[images, 3]``) and
        ``image_digests`` (``patch_digests``).
    """
    batch = render_patches(processor, items, prompt=prompt)
    if "pixel_values" in batch:
        batch["pixel_values"] = normalised(batch["pixel_values"], processor)
    return batch


def render_patches(processor: ProcessorMixin, items: Sequence[Item], *, prompt: str = "") -> Batch:
    """Do what ``render_items`` does, without ``normalised``: ``pixel_values`` then have an eighth of the bytes."""
    tokenizer, pixels = processor.tokenizer, {}
    limit, special = tokenizer.model_max_length, special_tokens(tokenizer)
    family = family_of_images(processor)
    markers, numbers = family.markers, [len(item.images) for item in items]
    texts = [
        render(text=item.full_text, images=images, prompt=prompt, tokens=special, markers=markers)
        for item, images in zip(items, numbers, strict=True)
    ]
    if images := [image for item in items for image in item.images]:
        pixels["pixel_values"], pixels["image_grid_thw"] = patches = image_patches(images, processor)
        pixels["image_digests"] = patch_digests(*patches, processor.image_processor)
        per_token = family.image_geometry(processor).patches_per_token
        counts = iter((pixels["image_grid_thw"].prod(dim=1) // per_token).tolist())
        texts = [markers.expanded(text, islice(counts, own)) for text, own in zip(texts, numbers, strict=True)]
    for item, text in zip(items, texts, strict=True):
        needed = text.count(markers.token) + markers.around * len(item.images) + len(eos_tokens(tokenizer))
        if needed > limit:
            raise CocoaError(
                f"{item} takes {needed} tokens before its text, more than max_length {limit}; lower max_pixels or "
                "raise max_length."
            )
    tokens = dict(tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"))
    is_visual = tokens["input_ids"] == tokenizer.convert_tokens_to_ids(markers.token)
    return {**tokens, "mm_token_type_ids": is_visual.long(), **pixels}


def row_images(row: Row) -> tuple[ItemImage, ...]:
    """Return the distinct images of query and positive, the query's first."""
    return tuple(dict.fromkeys(row.query.images + row.positive.images))


def joined(row: Row) -> Item:
    """Return the row as one item: its images and its texts, the query's first."""
    texts = [item.full_text for item in (row.query, row.positive) if item.full_text is not None]
    return Item(text=" ".join(texts) or None, images=row_images(row))


def instruction_tokens(batch: Batch, rows: Sequence[Row], processor: ProcessorMixin) -> Tensor:
    """Return which tokens of ``joined`` rows come from instructions, bool ``[B, L]``."""
    found = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    special = special_tokens(processor.tokenizer)
    for number, row in enumerate(rows):
        ends, start = set[int](), 0
        for item in (row.query, row.positive):
            ends |= set(range(start + 1, start + len(literal(item.instruction or "", special)) + 1))
            start += len(literal(item.full_text or "", special)) + (item.full_text is not None)
        if ends:
            text = processor.tokenizer(
                literal(joined(row).text or "", special), add_special_tokens=False, return_offsets_mapping=True
            )
            tokens = torch.tensor([end in ends for _, end in text["offset_mapping"]])
            visual = (batch["mm_token_type_ids"][number] != 0).nonzero()
            first = int(visual.max()) + 2 if len(visual) else 0  # after the token that ends an image
            found[number, first : first + len(tokens)] = tokens[: found.shape[1] - first]
    return found


def ordinary_tokens(batch: Batch, processor: ProcessorMixin) -> Tensor:
    """Return the positions of ordinary text tokens (no padding, special or visual token), bool ``[B, L]``."""
    is_text = batch["attention_mask"].bool() & (batch["mm_token_type_ids"] == 0)
    return is_text & ~is_special(batch["input_ids"], processor)


def text_tokens(batch: Batch, processor: ProcessorMixin) -> Tensor:
    """Return ``ordinary_tokens`` for masked next-token prediction: without a row's first, which no state precedes."""
    is_text = ordinary_tokens(batch, processor)
    is_text[:, 0] = False
    return is_text


def is_special(input_ids: Tensor, processor: ProcessorMixin) -> Tensor:
    """Return which tokens do not come from a text (padding, ``<EOS>``, visual tokens), bool of the same shape."""
    return torch.isin(input_ids, torch.tensor(sorted(processor.tokenizer.added_tokens_decoder)))


def replace_masked(batch: Batch, masked: Tensor, mask_token_id: int) -> Batch:
    """Replace masked tokens with the mask token; add ``masked_tokens`` ``[B, L]`` and ``target_ids`` ``[masked]``."""
    return {
        **batch,
        "input_ids": batch["input_ids"].masked_fill(masked, mask_token_id),
        "masked_tokens": masked,
        "target_ids": batch["input_ids"][masked],
    }
