"""The plan and the cost of a run, without loading weights: ``cocoa-embed train RECIPE --dry-run``."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from accelerate import PartialState
from transformers import PreTrainedConfig, ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import load_processor, read_config
from cocoa_embed.model.flex_attention import FLEX
from cocoa_embed.train.data.lengths import row_lengths
from cocoa_embed.train.data.mixture import ReadRows
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.plan.checks import bad_rows, examine
from cocoa_embed.train.plan.cost import StepCost, batch_shape
from cocoa_embed.train.plan.memory import ADAM_MOMENTS, FULL, stage_parameters, training_memory
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.stage import Stage

SAMPLE = 256
"""Rows of a stage that are rendered to estimate the length of all."""


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage, with estimates of its cost.

    :param rows: Rows by subset, after caps and weights.
    :param tokens_per_step: Tokens without padding, from a sample of the rows.
    :param flops: FLOPs of all steps, forward and backward, from the same sample.
    :param rows_at_once: Rows that a device runs in one forward pass; in the contrastive stage, items.
    :param memory_bytes: Bytes on one device by use, if all rows of a forward pass are as long as the longest row.
    :param checkpoint_bytes: Bytes of one checkpoint to resume from. While the stage trains there are up to three, in
        ``checkpoints`` beside ``folder``.
    :param folder: The folder of the stage's weights.
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
    checkpoint_bytes: int
    folder: str


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    :param devices: The number of devices.
    :param bad_rows: The rows to leave out, as in ``bad_rows.jsonl``.
    :param finished: The stages that are finished already.
    """

    recipe: str
    backbone: str
    devices: int
    stages: list[StagePlan]
    bad_rows: list[dict[str, str]]
    finished: list[str]


def plan(recipe: Recipe, out: Path, *, resume: bool = False) -> RunPlan:
    """Return the plan of a run, or fail as the run would.

    :raises UsageError: As ``run`` does.
    :raises CocoaError: As ``run`` does, except for missing or broken weights, which are not loaded.
    """
    prepared = examine(recipe, out, resume=resume)
    recipe = prepared.recipe
    config = read_config(recipe.backbone)
    processor = load_processor(recipe.backbone, max_length=recipe.max_length, max_pixels=recipe.max_pixels)
    return RunPlan(
        recipe=recipe.name,
        backbone=recipe.backbone,
        devices=PartialState().num_processes,
        stages=[
            _plan_stage(recipe.stages[name], read, processor, config, steps=prepared.steps[name], folder=out / name)
            for name, read in prepared.rows.items()
        ],
        bad_rows=[dataclasses.asdict(row) for row in bad_rows(prepared.rows)],
        finished=[result.stage for result in prepared.results],
    )


def _plan_stage(
    stage: Stage[StageSettings],
    read: ReadRows,
    processor: ProcessorMixin,
    config: PreTrainedConfig,
    *,
    steps: int,
    folder: Path,
) -> StagePlan:
    run, settings, devices = stage.run, stage.settings, PartialState().num_processes
    at_once = stage.sequences_at_once(devices)
    lengths = row_lengths(read.rows, processor, read.sizes)
    longest_row = read.rows[lengths.index(max(lengths))]
    examples = [*numbered(sample_rows(read.rows, run.seed)), *numbered([longest_row])]
    all_shapes = [[batch_shape(batch) for batch in stage.sequences(example, processor, config)]
                  for example in examples]  # fmt: skip
    longest = max((shape for of_row in all_shapes for shape in of_row), key=lambda shape: shape.tokens)
    shapes = all_shapes[:-1]
    cost, counts = StepCost.of(config, settings), stage_parameters(config, settings, stage.extra_module)
    memory = training_memory(
        counts,
        cost.size,
        longest.repeated(at_once),
        world_size=devices if run.sharding != "none" else 1,
        autocast=run.mixed_precision == "bf16",
        gradient_checkpointing=run.gradient_checkpointing,
        freeze_vision=settings.freeze_vision,
        dense_mask=stage.attention() != FLEX,
    )
    rows_on_device = stage.micro_batches(devices)[0] // devices
    patches = fmean(sum(shape.patches for shape in of_row) for of_row in shapes)
    inputs = round(rows_on_device * patches * cost.size.geometry.patch_width * FULL)
    return StagePlan(
        stage=stage.name,
        parameters=counts.total,
        trainable_parameters=counts.trainable,
        rows=read.counts,
        steps=steps,
        batch_size=settings.batch_size,
        rows_at_once=at_once,
        tokens_per_step=settings.batch_size * fmean(sum(shape.tokens for shape in of_row) for of_row in shapes),
        flops=steps * settings.batch_size * fmean(sum(map(cost.of_shape, of_row)) for of_row in shapes),
        memory_bytes={"total": memory.total + inputs, **dataclasses.asdict(memory), "inputs": inputs},
        checkpoint_bytes=FULL * counts.total + ADAM_MOMENTS * FULL * counts.trainable,
        folder=str(folder),
    )


def sample_rows(rows: Sequence[Row], seed: int) -> list[Row]:
    """Return at most ``SAMPLE`` of the rows.

    They are drawn at random: with a fixed number of rows per image, every n-th row may be the first of its image.
    """
    return list(rows) if len(rows) <= SAMPLE else random.Random(seed).sample(list(rows), SAMPLE)
