"""Show what a reconstruction stage predicts for a few rows, as plain data for ``run.json``: images are data URIs."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, one_line
from cocoa_embed.images.data_uri import data_uri
from cocoa_embed.model.families.family import PatchGeometry
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.probe import draw_images
from cocoa_embed.train.stages.rendering import batched, is_special, row_images
from cocoa_embed.train.stages.stage import Stage

SAMPLE_ROWS = 8

logger = logging.getLogger(__name__)


def stage_samples(
    trainer: CocoaTrainer,
    stage: Stage[StageSettings],
    processor: ProcessorMixin,
    rows: RowTable,
    held_out: np.ndarray,
) -> dict[str, Any] | None:
    """Return the samples of a reconstruction stage that has ended; None for other stages, and in other processes.

    Every process calls it; if the weights are sharded, all of them run the model. It draws from no generator that
    training uses. If samples cannot be made (an image is gone, memory is full), the run continues: ``failure`` says
    why, and so does a warning. Only a failure inside a sharded model ends it: the other processes would wait forever.

    :param rows: All rows of the stage.
    :param held_out: The indices of the rows held out of training; these are shown if there are any.
    :returns: What ``Stage.samples`` returns, and ``held_out``: whether the stage was not trained on these rows.
    """
    is_writer, is_sharded = trainer.is_world_process_zero(), trainer.is_fsdp_enabled
    if not (stage.has_samples and (is_writer or is_sharded)):
        return None
    shown = rows.select(held_out) if len(held_out) else rows
    places = draw_images(shown, SAMPLE_ROWS, stage.run.seed)
    chosen = shown.select(places) if len(places) else shown[:SAMPLE_ROWS]
    samples: dict[str, Any] = {}
    batches: list[tuple[Batch, list[Row]]] = []
    failure = None
    try:
        batches = sample_batches(trainer, stage.settings, chosen)
        if not is_sharded:
            samples = _run(trainer, stage, processor, batches)
    except Exception as error:  # noqa: BLE001  the weights took hours, samples are only shown
        failure = one_line(error) if isinstance(error, CocoaError) else f"{type(error).__name__}: {one_line(error)}"
    if is_sharded:
        failure = next(filter(None, gather_object([failure])), None)
        if failure is None:
            samples = _run(trainer, stage, processor, batches)
    if failure is not None:
        logger.warning("Samples for the report cannot be made (%s).", failure)
        return {"failure": failure}
    return {"held_out": len(held_out) > 0, **samples} if is_writer else None


def sample_batches(
    trainer: CocoaTrainer, settings: StageSettings, rows: Sequence[Row]
) -> list[tuple[Batch, list[Row]]]:
    """Return the rows in batches of the size that a device trains on at once, which is known to fit into memory."""
    described: Any = trainer.data_collator
    of_device = max(1, settings.batch_size // trainer.accelerator.num_processes)
    parts = batched(numbered(rows), settings.rows_at_once(of_device))
    return [(described.collate(part), [row for _, row in part]) for part in parts]


def _run(
    trainer: CocoaTrainer,
    stage: Stage[StageSettings],
    processor: ProcessorMixin,
    batches: Sequence[tuple[Batch, list[Row]]],
) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    register_fsdp_forward_method(model, "predict")  # gathers sharded weights, as a forward pass does
    with trainer.accelerator.autocast(), torch.no_grad():
        parts = [stage.samples(model, processor, batch, rows) for batch, rows in batches]
    lists = [name for name in parts[0] if name != "mask"]
    return {**parts[0], **{name: [each for part in parts for each in part[name]] for name in lists}}


def token_samples(
    batch: Batch, logits: Tensor, processor: ProcessorMixin, rows: Sequence[Row], images: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the text tokens of each row of a batch, and what a model predicts for those that are masked.

    :param logits: The logits of the masked tokens, ``[masked tokens, V]``.
    :param images: All images of the batch.
    :returns: For each row ``tokens``, ``masked`` (a flag per token), ``predicted`` (the token itself if it is not
        masked) and ``image``, the row's first image.
    """
    masked = batch["masked_tokens"]
    truth, predicted = batch["input_ids"].clone(), batch["input_ids"].clone()
    truth[masked] = batch["target_ids"]
    predicted[masked] = logits.argmax(dim=-1).cpu()
    is_text = ~is_special(truth, processor) & batch["attention_mask"].bool()
    firsts = np.cumsum([0, *(len(row_images(row)) for row in rows)])
    return [
        {
            "tokens": token_texts(truth[number][is_text[number]], processor),
            "masked": masked[number][is_text[number]].tolist(),
            "predicted": token_texts(predicted[number][is_text[number]], processor),
            "image": None if row.image is None else images[firsts[number]],
        }
        for number, row in enumerate(rows)
    ]


def token_texts(ids: Tensor, processor: ProcessorMixin) -> list[str]:
    """Return the text of each token: its raw spelling if it is part of a character, and nothing for an unknown id.

    Qwen's heads are wider than its vocabulary, so they can predict an id that the tokenizer lacks.
    """
    spelt = [token or "" for token in processor.tokenizer.convert_ids_to_tokens(ids)]
    texts = [processor.tokenizer.convert_tokens_to_string([token]) for token in spelt]
    return [token if "\ufffd" in text else text for token, text in zip(spelt, texts, strict=True)]


def shown_images(batch: Batch, pixels: Tensor, geometry: PatchGeometry, processor: ProcessorMixin) -> list[str]:
    """Return the images of a batch as data URIs.

    :param pixels: Pixel values in the order of the batch's ``pixel_values``, ``[patches, patch_width]``.
    """
    if "image_grid_thw" not in batch:
        return []
    grids = batch["image_grid_thw"]
    parts = zip(pixels.split(grids.prod(dim=1).tolist()), grids, strict=True)
    return [data_uri(patches_to_image(patches, grid, geometry, processor)) for patches, grid in parts]


def patches_to_image(patches: Tensor, grid: Tensor, geometry: PatchGeometry, processor: ProcessorMixin) -> Image.Image:
    """Assemble an image from its raw patches.

    :param patches: ``[grid_t * grid_h * grid_w, patch_width]``, in the order of ``pixel_values``: the patches of one
        visual token are adjacent.
    :param grid: The image's row of ``image_grid_thw``, int64 ``[3]``.
    """
    _, height, width = grid.tolist()
    merge, size = geometry.merge_size, geometry.patch_size
    blocks = patches.reshape(
        height // merge, width // merge, merge, merge, geometry.channels, geometry.temporal_patch_size, size, size
    )
    pixels = blocks[:, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4).reshape(height * size, width * size, -1)
    processing = processor.image_processor
    pixels = pixels * torch.tensor(processing.image_std) + torch.tensor(processing.image_mean)
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
