"""What a reconstruction stage makes of held-out rows, as pictures and words for the report."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ProcessorMixin

from cocoa_embed.attention import Block, bridge_mask
from cocoa_embed.backbone import PatchGeometry
from cocoa_embed.report.content import BridgeMask, PatchReconstruction, TokenReconstruction
from cocoa_embed.train.bridge import BridgeModel
from cocoa_embed.train.collators import Batch, BridgeCollator, WarmupCollator
from cocoa_embed.train.data import Row, load_row_image, numbered
from cocoa_embed.train.warmup import WarmupModel


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
    model: WarmupModel, collator: WarmupCollator, rows: Sequence[Row]
) -> tuple[list[PatchReconstruction], list[TokenReconstruction]]:
    """Hide parts of each row's image and caption, and let the stage-1 model fill them in.

    :param rows: Rows with an image each.
    """
    batch = collator(numbered(rows))
    if "pixel_values" not in batch:
        raise ValueError("the rows have no images to reconstruct")
    model.eval()
    logits, predicted = model.predict(_on_device_of(model, batch))
    logits, predicted = logits.cpu(), predicted.cpu()
    masked, hidden = batch["pixel_values"], batch["hidden_patches"]
    original, reconstructed = masked.clone(), masked.clone()
    original[hidden] = batch["target_patches"]
    reconstructed[hidden] = predicted
    sizes = batch["image_grid_thw"].prod(dim=1).tolist()
    triplets = zip(
        batch["image_grid_thw"], original.split(sizes), masked.split(sizes), reconstructed.split(sizes), strict=True
    )
    images = [
        [patches_to_image(patches, grid, collator.geometry, collator.processor) for patches in three]
        for grid, *three in triplets
    ]
    patches = [
        PatchReconstruction(before, hidden_away, filled_in, row.positive.text or "")
        for (before, hidden_away, filled_in), row in zip(images, rows, strict=True)
    ]
    tokens = _token_reconstructions(batch, logits, collator.processor, stage="warm-up", images=[i[0] for i in images])
    return patches, tokens


@torch.no_grad()
def bridge_reconstructions(
    model: BridgeModel, collator: BridgeCollator, rows: Sequence[Row]
) -> tuple[list[TokenReconstruction], BridgeMask]:
    """Hide most of each row's block B, let the stage-2 model fill it in, and draw the first row's mask."""
    batch = collator(numbered(rows))
    model.eval()
    logits = model.predict(_on_device_of(model, batch)).cpu()
    images = [load_row_image(row.image) for row in rows if row.image is not None]
    tokens = _token_reconstructions(batch, logits, collator.processor, stage="bridge", images=images)
    return tokens, _mask_of_first_row(batch, model, collator.processor)


def _on_device_of(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


def _token_reconstructions(
    batch: Batch, logits: Tensor, processor: ProcessorMixin, *, stage: str, images: list[Image.Image]
) -> list[TokenReconstruction]:
    hidden = batch["hidden_tokens"]
    truth, predicted = batch["input_ids"].clone(), batch["input_ids"].clone()
    truth[hidden] = batch["target_ids"]
    predicted[hidden] = logits.argmax(dim=-1)
    # The caption: block B in the bridge, every text token of the joint sequence in the warm-up.
    special = torch.tensor(sorted(processor.tokenizer.added_tokens_decoder))
    is_caption = ~torch.isin(truth, special) & batch["attention_mask"].bool()
    return [
        TokenReconstruction(
            tokens=processor.tokenizer.convert_ids_to_tokens(truth[row][is_caption[row]]),
            hidden=hidden[row][is_caption[row]].tolist(),
            predicted=processor.tokenizer.convert_ids_to_tokens(predicted[row][is_caption[row]]),
            stage=stage,
            image=images[row],
        )
        for row in range(len(truth))
    ]


def _mask_of_first_row(batch: Batch, model: BridgeModel, processor: ProcessorMixin) -> BridgeMask:
    length = int(batch["attention_mask"][0].sum())
    allowed = bridge_mask(batch["blocks"], eos_attends_to_b=model.eos_attends_to_b)[0, :length, :length]
    names = {Block.A: "A", Block.EOS: "EOS", Block.B: "B"}
    return BridgeMask(
        allowed=allowed.numpy(),
        labels=processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0, :length]),
        blocks=[names[Block(block)] for block in batch["blocks"][0, :length].tolist()],
    )
