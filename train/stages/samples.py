"""Show what a reconstruction stage makes of a few rows, as plain data for ``run.json``: images are data URIs."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, one_line
from cocoa_embed.images.data_uri import data_uri
from cocoa_embed.model.attention import Block, before_or_itself, bridge_mask, is_causal
from cocoa_embed.model.backbone import PatchGeometry
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch, DescribedBatches
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.probe import first_of_images
from cocoa_embed.train.stages.stage import Stage
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel

SAMPLE_ROWS = 8

BLOCK_NAMES = {Block.A: "A", Block.EOS: "EOS", Block.B: "B"}

Samples = dict[str, Any]
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@torch.no_grad()
def warmup_samples(model: WarmupModel, collator: WarmupCollator, batch: Batch, rows: Sequence[Row]) -> Samples:
    """Fill in the masked patches and tokens of a batch.

    :param batch: What ``collator`` has made of ``rows``.
    :returns: ``tokens`` (as in ``bridge_samples``), and ``patches``: for each row with an image ``caption`` and the
        images ``original``, ``masked`` and ``reconstructed``.
    """
    model.eval()
    logits, predicted = model.predict(_on_device_of(model, batch))
    original = batch["target_patches"]
    if "pixel_values" in batch:
        original = batch["pixel_values"].clone()
        original[batch["masked_patches"]] = batch["target_patches"]
    reconstructed = original.clone()
    reconstructed[batch["masked_patches"]] = predicted.float().cpu()
    images = [
        list(_images(batch, pixels, collator.geometry, collator.processor))
        for pixels in (original, batch.get("pixel_values", original), reconstructed)
    ]
    captions = [_caption(row) for row in rows if row.image is not None]
    patches = [
        {"caption": caption, "original": before, "masked": masked, "reconstructed": after}
        for caption, before, masked, after in zip(captions, *images, strict=True)
    ]
    return {"patches": patches, "tokens": _tokens(batch, logits.cpu(), collator.processor, rows, images[0])}


@torch.no_grad()
def bridge_samples(model: BridgeModel, collator: BridgeCollator, batch: Batch, rows: Sequence[Row]) -> Samples:
    """Fill in the masked tokens of each row's block B, and return the attention mask of the first row.

    :param batch: What ``collator`` has made of ``rows``.
    :returns: ``tokens``: for each row ``tokens``, ``masked`` (one flag a token), ``predicted`` (the token itself where
        nothing was masked) and ``image``; ``mask``: ``allowed`` (a string of 0 and 1 for each position that looks),
        ``labels`` and ``blocks`` ("A", "EOS" or "B"), each of L positions.
    """
    model.eval()
    logits = model.predict(_on_device_of(model, batch)).cpu()
    geometry = PatchGeometry.from_config(model.backbone.config)
    images = list(_images(batch, batch.get("pixel_values", torch.empty(0)), geometry, collator.processor))
    return {
        "tokens": _tokens(batch, logits, collator.processor, rows, images),
        "mask": _mask_of_first_row(batch, model, collator.processor),
    }


def stage_samples(
    trainer: CocoaTrainer, stage: Stage[StageSettings], rows: Sequence[Row], held_out: Sequence[Row]
) -> Samples | None:
    """Return the samples of a reconstruction stage that has ended; None for other stages, and in other processes.

    Every process calls it; where the weights are sharded, all run the model. It draws from no generator that training
    uses. Samples that cannot be made (an image is gone, memory is full) do not end the run: ``failure`` says why, and
    a warning too. Only a failure inside a sharded model ends it, as the other processes would wait for ever.

    :param rows: All rows of the stage.
    :param held_out: Those that it keeps out of training; they are shown where there are any.
    :returns: As ``warmup_samples`` or ``bridge_samples``, and ``held_out``: the stage was not trained on these rows.
    """
    is_writer, is_sharded = trainer.is_world_process_zero(), trainer.is_fsdp_enabled
    if not (stage.has_samples and (is_writer or is_sharded)):
        return None
    chosen = list(held_out[:SAMPLE_ROWS]) or first_of_images(rows, SAMPLE_ROWS) or list(rows[:SAMPLE_ROWS])
    batches, failure = _attempt(lambda: list(_batches(trainer, stage.settings, chosen)))
    if is_sharded:
        failure = next(filter(None, gather_object([failure])), None)
    samples: Samples | None = None
    if failure is None and batches is not None:
        if is_sharded:
            samples = _run(trainer, stage, batches)
        else:
            samples, failure = _attempt(lambda: _run(trainer, stage, batches))
    if failure is not None:
        logger.warning("Samples for the report cannot be made (%s).", failure)
        return {"failure": failure}
    return {"held_out": bool(held_out), **(samples or {})} if is_writer else None


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return what ``work`` returns, or why it failed."""
    try:
        return work(), None
    except CocoaError as error:
        return None, one_line(error)
    except Exception as error:  # noqa: BLE001  whatever is wrong with pictures, the weights took hours
        return None, f"{type(error).__name__}: {one_line(error)}"


def _batches(trainer: CocoaTrainer, settings: StageSettings, rows: Sequence[Row]) -> Iterator[tuple[Batch, list[Row]]]:
    """Yield the rows in batches as large as those that a device trains on at once: what fits there fits here."""
    described: Any = trainer.data_collator
    of_device = max(1, settings.batch_size // trainer.accelerator.num_processes)
    examples, size = numbered(rows), min(settings.mini_batch_size or of_device, of_device)
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        yield described.collate(part), [row for _, row in part]


def _run(trainer: CocoaTrainer, stage: Stage[StageSettings], batches: Sequence[tuple[Batch, list[Row]]]) -> Samples:
    described, model = trainer.data_collator, trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(described, DescribedBatches)
    was_training = model.training
    register_fsdp_forward_method(model, "predict")  # gathers the weights as a forward pass would; else does nothing
    try:
        with trainer.accelerator.autocast():
            parts = [stage.samples(model, described.collate, batch, rows) for batch, rows in batches]
    finally:
        model.train(was_training)
    lists = [name for name in parts[0] if name != "mask"]
    return {**parts[0], **{name: [each for part in parts for each in part[name]] for name in lists}}


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


def _images(batch: Batch, pixels: Tensor, geometry: PatchGeometry, processor: ProcessorMixin) -> Iterator[str]:
    """Yield the images of a batch, one after the other, from patches in the order of its ``pixel_values``."""
    if "image_grid_thw" not in batch:
        return
    grids = batch["image_grid_thw"]
    for patches, grid in zip(pixels.split(grids.prod(dim=1).tolist()), grids, strict=True):
        yield data_uri(patches_to_image(patches, grid, geometry, processor))


def _on_device_of(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


def _caption(row: Row) -> str:
    return " ".join(item.text for item in (row.query, row.positive) if item.text)


def _tokens(
    batch: Batch, logits: Tensor, processor: ProcessorMixin, rows: Sequence[Row], images: Sequence[str]
) -> list[dict[str, Any]]:
    masked = batch["masked_tokens"]
    truth, predicted = batch["input_ids"].clone(), batch["input_ids"].clone()
    truth[masked] = batch["target_ids"]
    predicted[masked] = logits.argmax(dim=-1)
    # The caption: block B in the bridge, every text token of the joint sequence in the warm-up.
    special = torch.tensor(sorted(processor.tokenizer.added_tokens_decoder))
    is_caption = ~torch.isin(truth, special) & batch["attention_mask"].bool()
    left = iter(images)
    return [
        {
            "tokens": _words(processor, truth[number][is_caption[number]]),
            "masked": masked[number][is_caption[number]].tolist(),
            "predicted": _words(processor, predicted[number][is_caption[number]]),
            "image": None if row.image is None else next(left),
        }
        for number, row in enumerate(rows)
    ]


def _words(processor: ProcessorMixin, ids: Tensor) -> list[str]:
    """Return tokens as they are spelt; an id that the tokenizer lacks, as Qwen's wider heads can predict, is empty."""
    return [token or "" for token in processor.tokenizer.convert_ids_to_tokens(ids)]


def _mask_of_first_row(batch: Batch, model: BridgeModel, processor: ProcessorMixin) -> dict[str, list[str]]:
    length = int(batch["attention_mask"][0].sum())
    allowed = bridge_mask(batch["blocks"], eos_attends_to_b=model.eos_attends_to_b)
    if is_causal(model.backbone):
        allowed = before_or_itself(allowed)
    return {
        "allowed": ["".join(map(str, row)) for row in allowed[0, :length, :length].int().tolist()],
        "labels": _words(processor, batch["input_ids"][0, :length]),
        "blocks": [BLOCK_NAMES[Block(block)] for block in batch["blocks"][0, :length].tolist()],
    }
