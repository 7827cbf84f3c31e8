"""The two implementations of a training step that are compared, and the measurement of one."""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import fmean, median
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cocoa_embed.demo.meter import peak_memory_bytes
from cocoa_embed.model.attention import bidirectional_mask, bridge_mask, make_bidirectional
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.flex_attention import FLEX, use_flex_attention
from cocoa_embed.model.forward_inputs import HostInputs, with_host_inputs
from cocoa_embed.model.vision_attention import pack_vision_attention
from cocoa_embed.train.loop.adapters import LANGUAGE_LINEARS, add_adapter, add_lora
from cocoa_embed.train.plan.cost import BatchShape, StepCost, batch_shape, measure_matmul_flops, model_size
from cocoa_embed.train.settings import AdapterSettings
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.losses import mae_loss
from cocoa_embed.train.stages.reconstruction import model_mask
from cocoa_embed.train.stages.warmup.settings import WarmupSettings
from cocoa_embed.train.stages.warmup.stage import WarmupModel
from shared.measuring import best_device
from shared.models import model_config
from steps.synthetic_rows import SyntheticRow, draw_rows, make_batch

SCALE = 50.0
MAE_WEIGHT = 0.5

Batch = dict[str, Tensor]


def stock_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Return the keyword arguments of a stock model for a batch, without its mask."""
    given = ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    inputs = {name: batch[name] for name in given if name in batch}
    return {**inputs, "position_ids": with_host_inputs(model, batch)["position_ids"], "use_cache": False}


class PlainModel(nn.Module):
    """``labels=`` on the stock class under a dense mask; the warm-up uses our pixel decoder."""

    def __init__(self, ours: WarmupModel | BridgeModel) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        model = self.ours.backbone
        is_bridge = "blocks" in batch
        allowed = bridge_mask(batch["blocks"]) if is_bridge else bidirectional_mask(batch["attention_mask"])
        mask, inputs = model_mask(model, allowed), stock_inputs(model, batch)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[batch["masked_tokens"]] = batch["target_ids"]
        has_patches = "masked_patches" in batch
        outputs = model(**inputs, attention_mask=mask, labels=labels, output_hidden_states=has_patches)
        loss = outputs.loss
        if has_patches:
            visual = (batch["mm_token_type_ids"] == 1).flatten().nonzero().flatten()
            decoded = self.ours.pixel_decoder(outputs.hidden_states[-1], visual, mask, inputs["position_ids"])
            loss = loss + MAE_WEIGHT * mae_loss(decoded[batch["masked_patches"]], batch["target_patches"])
        return {"loss": loss, "logits": outputs.logits}


class Embedder(nn.Sequential):
    """``normalize(hidden[<EOS>])`` in the form that the losses of sentence-transformers take."""

    def forward(self, batch: Batch) -> Batch:
        model = self[0]
        mask, base = batch["attention_mask"], model.base_model
        states = base(**stock_inputs(model, batch), attention_mask=mask).last_hidden_state
        last = mask.sum(dim=1) - 1
        embeddings = states[torch.arange(len(states), device=states.device), last]
        return {"sentence_embedding": nn.functional.normalize(embeddings, dim=-1)}


def build(
    options: argparse.Namespace, config: PreTrainedConfig, device: torch.device
) -> tuple[nn.Module, Callable[[list[Batch]], Tensor]]:
    """Return the model with its random weights, and the loss of a step's batches."""
    torch.manual_seed(0)
    with device:
        model = family_of(config).model_class(config)
    make_bidirectional(model)
    if options.adapter:
        settings = AdapterSettings(kind=options.adapter, dropout=options.dropout)
        if options.peft:
            peft_adapter(model, settings)
        else:
            add_adapter(model, settings, bf16=device.type == "cuda")
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    is_ours = options.side == "ours"
    if is_ours:
        if options.attention == FLEX:
            use_flex_attention(model)
        pack_vision_attention(model)
    model.train()
    if options.stage == "contrastive":
        embedder = Embedder(model)
        cached = CachedMultipleNegativesRankingLoss(embedder, scale=SCALE, mini_batch_size=options.chunk)
        loss = cached if is_ours else MultipleNegativesRankingLoss(embedder, scale=SCALE)
        return model, lambda batches: loss(batches, None)
    warmup = WarmupSettings(steps=1, batch_size=1, mae_weight=MAE_WEIGHT)
    with device:
        stage = BridgeModel(model) if options.stage == "bridge" else WarmupModel(model, warmup)
    runs = stage if is_ours else PlainModel(stage)
    return stage, lambda batches: runs(**batches[0])["loss"]


def peft_adapter(model: PreTrainedModel, settings: AdapterSettings) -> None:
    """Add PEFT's own adapter to all projections."""
    add_lora(model, settings, sorted(LANGUAGE_LINEARS | family_of(model.config).adapted))


def draw(options: argparse.Namespace) -> list[SyntheticRow]:
    count = options.steps * options.batch_size
    if options.same_length:
        side = options.image_sides[0]
        return [SyntheticRow(text=options.same_length - side**2 - 1, side=side)] * count
    return draw_rows(count, sides=options.image_sides, seed=0)


def in_batches(rows: list[SyntheticRow], options: argparse.Namespace) -> list[list[SyntheticRow]]:
    """Cut rows into batches. Ours sorts by length: all rows first, or in the contrastive stage within each batch."""
    size, is_sorted = options.batch_size, options.side == "ours"
    if is_sorted and options.stage != "contrastive":
        rows = sorted(rows, key=lambda row: row.length)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [sorted(batch, key=lambda row: row.length) for batch in batches] if is_sorted else batches


def make_inputs(rows: list[SyntheticRow], config: PreTrainedConfig, stage: str, seed: int) -> list[Batch]:
    """Return the batches of a step: one, or in the contrastive stage two, the anchors and a text for each."""
    columns = [rows]
    if stage == "contrastive":
        columns.append([SyntheticRow(text=row.text, side=0) for row in rows])
    return [make_batch(column, config, stage, seed=seed + number) for number, column in enumerate(columns)]


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes()


def forget_memory() -> None:
    """Free unused memory, and restart the measurement of the peak."""
    clear_device_cache(garbage_collection=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Measure one side: the loss of a batch that both sides share, then passes over all rows.

    Speeds count only the work that the rows need: no padding, no logit without a target, nothing computed twice.
    """
    device = best_device()
    config = model_config(options.model)
    module, loss_of = build(options, config, device)
    rows = draw(options)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-7)
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()

    def step(batches: list[Batch]) -> float:
        with autocast:
            loss = loss_of(batches)
            loss.backward()
        optimizer.step()
        module.zero_grad()
        return loss.item()

    before = peak_bytes(device)
    shapes: list[BatchShape] = []

    def timed(batch_rows: list[SyntheticRow], seed: int) -> tuple[float, float]:
        """Run a step on rows; return its seconds and its loss."""
        made = make_inputs(batch_rows, config, options.stage, seed)
        shapes.extend(map(batch_shape, made))
        if options.side == "ours" and options.stage != "contrastive":
            made = list(map(HostInputs(config), made))
        batches = [send_to_device(batch, device) for batch in made]
        started = time.perf_counter()
        loss = step(batches)
        return time.perf_counter() - started, loss

    _, loss = timed(rows[: options.batch_size], seed=1)
    shapes.clear()
    steps = in_batches(rows, options)
    passes = options.passes + (device.type == "cuda")
    seconds = [fmean(timed(batch, seed)[0] for seed, batch in enumerate(steps)) for _ in range(passes)]
    peak, per_step, count = peak_bytes(device), median(seconds[-options.passes :]), passes * len(steps)
    tokens = sum(shape.tokens for shape in shapes) / count
    flops = sum(map(StepCost(model_size(config), adapter=bool(options.adapter)).of_shape, shapes)) / count
    matmul_flops = measure_matmul_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return {
        "batch_size_rows": options.batch_size,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / per_step,
        "flops_per_step": flops,
        "matmul_flops_per_second": matmul_flops,
        "mfu": flops / per_step / matmul_flops,
        "seconds_per_step": per_step,
        "peak_memory_bytes": peak,
        "peak_above_model_bytes": peak - before,
        "loss": loss,
    }


def measure_growing(options: argparse.Namespace) -> list[dict[str, float]]:
    """Measure one side at ``--batch-size`` rows, twice as many, and so on, as long as they fit into memory."""
    found: list[dict[str, float]] = []
    while options.most_rows is None or options.batch_size <= options.most_rows:
        try:
            found.append(measure(options))
        except torch.OutOfMemoryError:
            break
        forget_memory()
        options.batch_size *= 2
    return found
