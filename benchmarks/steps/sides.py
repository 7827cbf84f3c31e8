"""The two ways to do a training step, and how one is measured."""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.model.attention import bidirectional_mask, bridge_mask, make_bidirectional
from cocoa_embed.model.backbone import SUPPORTED, PatchGeometry
from cocoa_embed.model.flex_attention import FLEX, resolve_attention, use_flex_attention
from cocoa_embed.train.plan.cost import measure_matmul_flops, model_size, total_training_flops
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.losses import mae_loss
from cocoa_embed.train.stages.reconstruction import model_mask, position_ids
from cocoa_embed.train.stages.warmup.model import WarmupModel
from cocoa_embed.train.stages.warmup.settings import WarmupSettings
from steps.real_configs import real_config
from steps.synthetic_rows import SyntheticRow, draw_rows, make_batch, useful_shapes

SCALE = 50.0
MAE_WEIGHT = 0.5

Batch = dict[str, Tensor]
StepInputs = Batch | list[Batch]


class PlainModel(nn.Module):
    """``labels=`` on the stock class under a dense mask; for the warm-up with our pixel decoder, as on our side."""

    def __init__(self, ours: WarmupModel | BridgeModel) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        model = self.ours.backbone
        is_bridge = "blocks" in batch
        allowed = bridge_mask(batch["blocks"]) if is_bridge else bidirectional_mask(batch["attention_mask"])
        mask, positions = model_mask(model, allowed), position_ids(model, batch)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[batch["masked_tokens"]] = batch["target_ids"]
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=positions,
            pixel_values=batch.get("pixel_values"),
            image_grid_thw=batch.get("image_grid_thw"),
            mm_token_type_ids=batch["mm_token_type_ids"],
            labels=labels,
            use_cache=False,
            output_hidden_states="masked_patches" in batch,
        )
        loss = outputs.loss
        if "masked_patches" in batch:
            visual = batch["mm_token_type_ids"] == 1
            decoded = self.ours.pixel_decoder(outputs.hidden_states[-1], visual, mask, positions)
            loss = loss + MAE_WEIGHT * mae_loss(decoded[batch["masked_patches"]], batch["target_patches"])
        return {"loss": loss, "logits": outputs.logits}


class Embedder(nn.Sequential):
    """``normalize(hidden[<EOS>])`` in the form that the losses of sentence-transformers take."""

    def forward(self, batch: Batch) -> Batch:
        model = self[0]
        states = model.base_model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=position_ids(model, batch),
            pixel_values=batch.get("pixel_values"),
            image_grid_thw=batch.get("image_grid_thw"),
            mm_token_type_ids=batch["mm_token_type_ids"],
            use_cache=False,
        ).last_hidden_state
        last = batch["attention_mask"].sum(dim=1) - 1
        embeddings = states[torch.arange(len(states), device=states.device), last]
        return {"sentence_embedding": nn.functional.normalize(embeddings, dim=-1)}


def build(options: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, Callable[[Any], Tensor]]:
    """Return the model with its random weights, and what makes a loss of a batch."""
    torch.manual_seed(0)
    config = real_config(options.model)
    with device:
        model = SUPPORTED[config.model_type](config)
    make_bidirectional(model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    is_ours = options.side == "ours"
    attention = resolve_attention(options.attention, sparse=options.stage == "bridge", device_type=device.type)
    if is_ours and attention == FLEX:
        use_flex_attention(model)
    model.train()
    if options.stage == "contrastive":
        embedder = Embedder(model)
        loss = (
            CachedMultipleNegativesRankingLoss(embedder, scale=SCALE, mini_batch_size=options.chunk)
            if is_ours
            else MultipleNegativesRankingLoss(embedder, scale=SCALE)
        )
        return model, lambda batch: loss(batch, None)
    with device:
        stage = (
            BridgeModel(model)
            if options.stage == "bridge"
            else WarmupModel(
                model, PatchGeometry.from_config(config), WarmupSettings(steps=1, batch_size=1, mae_weight=MAE_WEIGHT)
            )
        )
    runs = stage if is_ours else PlainModel(stage)
    return stage, lambda batch: runs(**batch)["loss"]


def draw(options: argparse.Namespace) -> list[SyntheticRow]:
    count = options.steps * options.batch_size
    if options.same_length:
        side = options.image_sides[0]
        return [SyntheticRow(text=options.same_length - side**2 - 1, side=side)] * count
    return draw_rows(count, sides=options.image_sides, seed=0)


def in_batches(rows: list[SyntheticRow], options: argparse.Namespace) -> list[list[SyntheticRow]]:
    """Cut rows into batches: ours sorts them first, in the contrastive stage within each batch alone."""
    size = options.batch_size
    if options.side == "ours" and options.stage != "contrastive":
        rows = sorted(rows, key=lambda row: row.length)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    if options.side == "ours" and options.stage == "contrastive":
        batches = [sorted(batch, key=lambda row: row.length) for batch in batches]
    return batches


def inputs(rows: list[SyntheticRow], options: argparse.Namespace, device: torch.device, seed: int) -> StepInputs:
    """Return a batch on the device; for the contrastive stage an anchor and a text that goes with it."""
    config = real_config(options.model)
    sides = [rows]
    if options.stage == "contrastive":
        sides.append([SyntheticRow(text=row.text, side=0) for row in rows])
    batches = [
        {name: value.to(device) for name, value in make_batch(side, config, options.stage, seed=seed + place).items()}
        for place, side in enumerate(sides)
    ]
    return batches if options.stage == "contrastive" else batches[0]


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run one side: the loss of a common batch, then passes over all rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, loss_of = build(options, device)
    rows = draw(options)
    optimizer = None if options.no_optimizer else torch.optim.AdamW(module.parameters(), lr=1e-7)
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()

    def step(batch: StepInputs) -> float:
        with autocast:
            loss = loss_of(batch)
            loss.backward()
        if optimizer is not None:
            optimizer.step()
        module.zero_grad()
        return loss.item()

    before = peak_bytes(device)
    loss = step(inputs(rows[: options.batch_size], options, device, seed=1))
    batches = in_batches(rows, options)
    seconds = []
    for _ in range(options.passes + (device.type == "cuda")):
        total = 0.0
        for place, batch_rows in enumerate(batches):
            batch = inputs(batch_rows, options, device, seed=place)
            started = time.perf_counter()
            step(batch)
            total += time.perf_counter() - started
        seconds.append(total / len(batches))
    peak = peak_bytes(device)
    per_step = statistics.median(seconds[-options.passes :])
    return report(options, rows, device, per_step) | {
        "seconds_per_step": per_step,
        "peak_memory_bytes": peak,
        "peak_above_model_bytes": peak - before,
        "loss": loss,
    }


def report(
    options: argparse.Namespace, rows: list[SyntheticRow], device: torch.device, per_step: float
) -> dict[str, float]:
    """Return speeds over what the rows need: no padding, no logit that has no target, nothing run twice."""
    config = real_config(options.model)
    sides = [rows]
    if options.stage == "contrastive":
        sides.append([SyntheticRow(text=row.text, side=0) for row in rows])
    shapes = [shape for side in sides for shape in useful_shapes(side, config, options.stage)]
    tokens = sum(shape.tokens for shape in shapes) / options.steps
    flops = total_training_flops(model_size(config), shapes) / options.steps
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    yardstick = measure_matmul_flops(device, dtype)
    return {
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / per_step,
        "flops_per_step": flops,
        "matmul_flops_per_second": yardstick,
        "mfu": flops / per_step / yardstick,
    }
