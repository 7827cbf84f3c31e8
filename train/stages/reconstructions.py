"""What a reconstruction stage makes of a few rows, as pictures and words for people to look at."""

from collections.abc import Sequence
from itertools import compress

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ProcessorMixin

from cocoa_embed.model.attention import Block, before_or_itself, bridge_mask, is_causal
from cocoa_embed.model.backbone import PatchGeometry
from cocoa_embed.report.content import BridgeMask, PatchReconstruction, TokenReconstruction
from cocoa_embed.train.data.rows import Row, numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel


def patches_to_image(patches: Tensor, grid: Tensor, geometry: PatchGeometry, processor: ProcessorMixin) -> Image.Image:
    """Put the raw patches of one image together again.

    :param patches: ``[grid_t * grid_h * grid_w, patch_width]``, in the order of ``pixel_values``: the patches behind
        one visual token stand together.
    :param grid: The image's row of ``image_grid_thw``, int64 ``[3]``.
    """
    _, height, width = grid.tolist()
    merge, size = geometry.merge_size, geometry.patch_size
    blocks = patches.reshape(
        height // merge, width // merge, merge, merge, geometry.channels, geometry.temporal_patch_size, size, size
    )
    pixels = blocks[:, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4).reshape(height * size, width * size, -1)
    mean, std = (
        torch.tensor(values) for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    return Image.fromarray(((pixels * std + mean).clamp(0, 1) * 255).round().byte().numpy().astype(np.uint8))


@torch.no_grad()
def warmup_reconstructions(
    model: WarmupModel, collator: WarmupCollator, rows: Sequence[Row], batch: Batch | None = None
) -> tuple[list[PatchReconstruction], list[TokenReconstruction]]:
    """Hide parts of each row's image and caption, and let the stage-1 model fill them in.

    :param batch: What the collator has made of the rows, where it has.
    :returns: A picture for each row that has one, and the words of each.
    """
    batch = collator(numbered(rows)) if batch is None else batch
    model.eval()
    logits, predicted = model.predict(_on_device_of(model, batch))
    original = _whole_pixels(batch)
    reconstructed = original.clone()
    reconstructed[batch["masked_patches"]] = predicted.float().cpu()
    # Rows without an image have no part in the patches, so pictures are counted by themselves.
    pictured = [row for row in rows if row.image is not None]
    pictures = [
        _pictures(batch, pixels, collator.geometry, collator.processor)
        for pixels in (original, batch.get("pixel_values", original), reconstructed)
    ]
    patches = [
        PatchReconstruction(before, hidden_away, filled_in, _caption(row))
        for before, hidden_away, filled_in, row in zip(*pictures, pictured, strict=True)
    ]
    images = _by_row(rows, pictures[0])
    return patches, _token_reconstructions(batch, logits.cpu(), collator.processor, stage="warm-up", images=images)


@torch.no_grad()
def bridge_reconstructions(
    model: BridgeModel, collator: BridgeCollator, rows: Sequence[Row], batch: Batch | None = None
) -> tuple[list[TokenReconstruction], BridgeMask]:
    """Hide most of each row's block B, let the stage-2 model fill it in, and draw the first row's mask.

    :param batch: What the collator has made of the rows, where it has.
    """
    batch = collator(numbered(rows)) if batch is None else batch
    model.eval()
    logits = model.predict(_on_device_of(model, batch)).cpu()
    geometry = PatchGeometry.from_config(model.backbone.config)
    pixels = batch.get("pixel_values", torch.empty(0, geometry.patch_width))
    images = _by_row(rows, _pictures(batch, pixels, geometry, collator.processor))
    tokens = _token_reconstructions(batch, logits, collator.processor, stage="bridge", images=images)
    return tokens, _mask_of_first_row(batch, model, collator.processor)


def _on_device_of(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


def _whole_pixels(batch: Batch) -> Tensor:
    """Return the patches of a warm-up batch as they were before any was hidden."""
    if "pixel_values" not in batch:
        return batch["target_patches"]
    original = batch["pixel_values"].clone()
    original[batch["masked_patches"]] = batch["target_patches"]
    return original


def _pictures(batch: Batch, pixels: Tensor, geometry: PatchGeometry, processor: ProcessorMixin) -> list[Image.Image]:
    """Return the images of a batch, one after the other, from patches that are as its ``pixel_values``."""
    if "image_grid_thw" not in batch:
        return []
    grids = batch["image_grid_thw"]
    parts = pixels.split(grids.prod(dim=1).tolist())
    return [patches_to_image(patches, grid, geometry, processor) for patches, grid in zip(parts, grids, strict=True)]


def _by_row(rows: Sequence[Row], images: list[Image.Image]) -> list[Image.Image | None]:
    has_image = [row.image is not None for row in rows]
    by_row: list[Image.Image | None] = [None] * len(rows)
    for index, image in zip(compress(range(len(rows)), has_image), images, strict=True):
        by_row[index] = image
    return by_row


def _caption(row: Row) -> str:
    return " ".join(item.text for item in (row.query, row.positive) if item.text)


def _token_reconstructions(
    batch: Batch, logits: Tensor, processor: ProcessorMixin, *, stage: str, images: list[Image.Image | None]
) -> list[TokenReconstruction]:
    hidden = batch["masked_tokens"]
    truth, predicted = batch["input_ids"].clone(), batch["input_ids"].clone()
    truth[hidden] = batch["target_ids"]
    predicted[hidden] = logits.argmax(dim=-1)
    # The caption: block B in the bridge, every text token of the joint sequence in the warm-up.
    special = torch.tensor(sorted(processor.tokenizer.added_tokens_decoder))
    is_caption = ~torch.isin(truth, special) & batch["attention_mask"].bool()
    return [
        TokenReconstruction(
            tokens=_words(processor, truth[row][is_caption[row]]),
            hidden=hidden[row][is_caption[row]].tolist(),
            predicted=_words(processor, predicted[row][is_caption[row]]),
            stage=stage,
            image=images[row],
        )
        for row in range(len(truth))
    ]


def _words(processor: ProcessorMixin, ids: Tensor) -> list[str]:
    """Return tokens as they are spelt; an id that the tokenizer lacks, as Qwen's wider heads can predict, is empty."""
    return [token or "" for token in processor.tokenizer.convert_ids_to_tokens(ids)]


def _mask_of_first_row(batch: Batch, model: BridgeModel, processor: ProcessorMixin) -> BridgeMask:
    length = int(batch["attention_mask"][0].sum())
    allowed = bridge_mask(batch["blocks"], eos_attends_to_b=model.eos_attends_to_b)
    if is_causal(model.backbone):
        allowed = before_or_itself(allowed)
    allowed = allowed[0, :length, :length]
    names = {Block.A: "A", Block.EOS: "EOS", Block.B: "B"}
    return BridgeMask(
        allowed=allowed.numpy(),
        labels=_words(processor, batch["input_ids"][0, :length]),
        blocks=[names[Block(block)] for block in batch["blocks"][0, :length].tolist()],
    )
