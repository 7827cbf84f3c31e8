"""What a run would do and cost, told without loading weights: ``cocoa-embed train RECIPE --dry-run``."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState
from transformers import ProcessorMixin

from cocoa_embed.backbone import PatchGeometry, load_processor, read_config
from cocoa_embed.flex import FLEX, resolve_attention
from cocoa_embed.train.arguments import micro_batches
from cocoa_embed.train.collators import Batch, BridgeCollator, WarmupCollator, render_items
from cocoa_embed.train.cost import BatchShape, StepCost, batch_shape
from cocoa_embed.train.data import Row, numbered
from cocoa_embed.train.memory import Memory, Parameters, parameters, training_memory
from cocoa_embed.train.preparation import examine
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.sections import BridgeSection, ContrastiveSection, WarmupSection

SAMPLE = 64
"""Rows that are made into sequences to tell how long all are."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage would do, and an estimate of what it takes.

    :param rows: Rows by subset, after caps and weights.
    :param tokens_per_step: Without padding, from a sample of the rows.
    :param flops: Of all steps, forward and backward, from the same sample.
    :param memory_bytes: Of one device by what they hold, when it runs its longest rows.
    :param folder: Where the stage's weights would be written.
    """

    stage: str
    parameters: int
    trainable_parameters: int
    rows: dict[str, int]
    steps: int
    batch_size: int
    rows_at_once: int
    tokens_per_step: float
    flops: float
    memory_bytes: dict[str, int]
    folder: str


@dataclass(frozen=True)
class RunPlan:
    """What a run would do.

    :param devices: How many share each step.
    :param bad_rows: Rows that would be left out, as ``bad_rows.jsonl`` would tell.
    :param finished: Stages that would not be run again.
    """

    recipe: str
    backbone: str
    devices: int
    stages: list[StagePlan]
    bad_rows: list[dict[str, str]]
    finished: list[str]


def plan(recipe: Recipe, out: Path, *, resume: bool = False, progress: bool = True) -> RunPlan:
    """Tell what a run would do; it fails where the run would.

    :raises UsageError: As the run would.
    :raises CocoaError: As the run would; weights that are missing or broken are not noticed, as none are loaded.
    """
    prepared = examine(recipe, out, resume=resume, progress=progress)
    processor = load_processor(recipe.backbone, max_length=recipe.max_length, max_pixels=recipe.max_pixels)
    bad = dict.fromkeys(row for read in prepared.rows.values() for row in read.bad)
    return RunPlan(
        recipe=recipe.name,
        backbone=recipe.backbone,
        devices=PartialState().num_processes,
        stages=[
            _plan_stage(recipe, stage, read.rows, read.counts, prepared.steps[stage], processor, out / stage)
            for stage, read in prepared.rows.items()
        ],
        bad_rows=[dataclasses.asdict(row) for row in bad],
        finished=[result.stage for result in prepared.results],
    )


def _plan_stage(
    recipe: Recipe,
    stage: str,
    rows: Sequence[Row],
    counts: dict[str, int],
    steps: int,
    processor: ProcessorMixin,
    folder: Path,
) -> StagePlan:
    section, config = recipe.section(stage), read_config(recipe.backbone)
    devices = PartialState().num_processes
    together, _ = micro_batches(stage, section, devices)
    at_once = section.cache_chunk if isinstance(section, ContrastiveSection) else together // devices
    shapes = sample_shapes(recipe, stage, rows, processor)
    cost = StepCost.of(config, section)
    known = parameters(config, adapter=section.adapter, freeze_vision=section.freeze_vision)
    return StagePlan(
        stage=stage,
        parameters=known.total,
        trainable_parameters=known.trainable,
        rows=counts,
        steps=steps,
        batch_size=section.batch_size,
        rows_at_once=at_once,
        tokens_per_step=section.batch_size * fmean(sum(shape.tokens for shape in of_row) for of_row in shapes),
        flops=steps * section.batch_size * fmean(sum(map(cost.of_shape, of_row)) for of_row in shapes),
        memory_bytes=_memory_bytes(_memory(recipe, stage, known, cost, shapes, at_once, devices)),
        folder=str(folder),
    )


def _memory(
    recipe: Recipe,
    stage: str,
    known: Parameters,
    cost: StepCost,
    shapes: Sequence[Sequence[BatchShape]],
    at_once: int,
    devices: int,
) -> Memory:
    longest = max((shape for of_row in shapes for shape in of_row), key=lambda shape: shape.length)
    implementation = resolve_attention(recipe.attn_implementation, stage=stage, device_type=PartialState().device.type)
    return training_memory(
        known,
        cost.size,
        _repeated(longest, at_once),
        world_size=devices if recipe.sharding != "none" else 1,
        autocast=recipe.mixed_precision == "bf16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        freeze_vision=recipe.section(stage).freeze_vision,
        dense_mask=implementation != FLEX,
    )


def _memory_bytes(memory: Memory) -> dict[str, int]:
    return {"total": memory.total, **dataclasses.asdict(memory)}


def _repeated(shape: BatchShape, times: int) -> BatchShape:
    """Return the shape of a batch of ``times`` rows like the one of ``shape``."""
    return BatchShape(
        rows=times,
        length=shape.length,
        tokens=times * shape.tokens,
        image_grids=shape.image_grids * times,
        hidden_tokens=times * shape.hidden_tokens,
        hidden_patches=times * shape.hidden_patches,
    )


def sample_shapes(recipe: Recipe, stage: str, rows: Sequence[Row], processor: ProcessorMixin) -> list[list[BatchShape]]:
    """Make some rows into sequences as the stage would, each by itself, and return the shapes of each row's sequences.

    :returns: One shape for a row, or in the contrastive stage one for each of its items.
    """
    sample = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
    section = recipe.section(stage)
    if isinstance(section, ContrastiveSection):
        return [
            [
                batch_shape(render_items(processor, [item]))
                for item in (row.query, row.positive, *row.negatives[: section.hard_negatives])
            ]
            for row in sample
        ]
    collate: Callable[[list[Any]], Batch]
    if isinstance(section, WarmupSection):
        collate = WarmupCollator(
            processor,
            PatchGeometry.from_config(read_config(recipe.backbone)),
            seed=recipe.seed,
            text_mask_ratio=section.text_mask_ratio,
            image_mask_ratio=section.image_mask_ratio,
        )
    else:
        assert isinstance(section, BridgeSection)
        collate = BridgeCollator(processor, seed=recipe.seed, mask_ratio=section.mask_ratio)
    return [[batch_shape(collate([example]))] for example in numbered(sample)]
