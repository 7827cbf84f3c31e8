"""What a run would do and cost, told without loading weights: ``cocoa-embed train RECIPE --dry-run``."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from accelerate import PartialState
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import PatchGeometry, load_processor, read_config
from cocoa_embed.model.flex_attention import FLEX
from cocoa_embed.train.data.lengths import row_lengths
from cocoa_embed.train.data.mixture import ReadRows
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.arguments import micro_batches, stage_attention
from cocoa_embed.train.plan.checks import bad_rows, examine
from cocoa_embed.train.plan.cost import BatchShape, StepCost, batch_shape
from cocoa_embed.train.plan.memory import ADAM_MOMENTS, FULL, stage_parameters, training_memory
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import ContrastiveSection, WarmupSection
from cocoa_embed.train.stages.collators import reconstruction_collator, render_items
from cocoa_embed.train.stages.pixel_decoder import PixelDecoder

SAMPLE = 256
"""Rows of a stage that are made into sequences, to tell how long all are."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage would do, and an estimate of what it takes.

    :param rows: Rows by subset, after caps and weights.
    :param tokens_per_step: Without padding, from a sample of the rows.
    :param flops: Of all steps, forward and backward, from the same sample.
    :param memory_bytes: Of one device by what they hold, when all that it runs at once is as long as the longest row;
        of the longest of a sample where the sizes of images are not known.
    :param checkpoint_bytes: Of one checkpoint to resume from; there are up to three at a time, in ``checkpoints``
        beside ``folder``, while the stage runs.
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
    checkpoint_bytes: int
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
    return RunPlan(
        recipe=recipe.name,
        backbone=recipe.backbone,
        devices=PartialState().num_processes,
        stages=[
            _plan_stage(recipe, stage, read, processor, steps=prepared.steps[stage], folder=out / stage)
            for stage, read in prepared.rows.items()
        ],
        bad_rows=[dataclasses.asdict(row) for row in bad_rows(prepared)],
        finished=[result.stage for result in prepared.results],
    )


def _plan_stage(
    recipe: Recipe, stage: str, read: ReadRows, processor: ProcessorMixin, *, steps: int, folder: Path
) -> StagePlan:
    section, config = recipe.section(stage), read_config(recipe.backbone)
    devices = PartialState().num_processes
    together, _ = micro_batches(stage, section, devices)
    at_once = section.cache_chunk if isinstance(section, ContrastiveSection) else together // devices
    shapes = sample_shapes(recipe, stage, read.rows, processor)
    longest = max(
        (shape for of_row in [*shapes, *_shapes_of_longest(recipe, stage, read, processor)] for shape in of_row),
        key=lambda shape: shape.tokens,
    )
    cost = StepCost.of(config, section)
    counts = stage_parameters(
        config,
        section,
        lambda model: PixelDecoder(model, cost.size.geometry) if isinstance(section, WarmupSection) else None,
    )
    memory = training_memory(
        counts,
        cost.size,
        longest.repeated(at_once),
        world_size=devices if recipe.sharding != "none" else 1,
        autocast=recipe.mixed_precision == "bf16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        freeze_vision=section.freeze_vision,
        dense_mask=stage_attention(recipe, stage) != FLEX,
    )
    patches = fmean(sum(shape.patches for shape in of_row) for of_row in shapes)
    on_device = section.batch_size // devices if isinstance(section, ContrastiveSection) else at_once
    inputs = round(on_device * patches * cost.size.geometry.patch_width * FULL)
    return StagePlan(
        stage=stage,
        parameters=counts.total,
        trainable_parameters=counts.trainable,
        rows=read.counts,
        steps=steps,
        batch_size=section.batch_size,
        rows_at_once=at_once,
        tokens_per_step=section.batch_size * fmean(sum(shape.tokens for shape in of_row) for of_row in shapes),
        flops=steps * section.batch_size * fmean(sum(map(cost.of_shape, of_row)) for of_row in shapes),
        memory_bytes={"total": memory.total + inputs, **dataclasses.asdict(memory), "inputs": inputs},
        checkpoint_bytes=FULL * counts.total + ADAM_MOMENTS * FULL * counts.trainable,
        folder=str(folder),
    )


def _shapes_of_longest(recipe: Recipe, stage: str, read: ReadRows, processor: ProcessorMixin) -> list[list[BatchShape]]:
    """Return the shapes of the longest row, where the images' sizes are known."""
    if not all(image in read.sizes for row in read.rows for image in row.images()):
        return []
    lengths = row_lengths(read.rows, processor, read.sizes)
    return sample_shapes(recipe, stage, [read.rows[lengths.index(max(lengths))]], processor)


def sample_shapes(recipe: Recipe, stage: str, rows: Sequence[Row], processor: ProcessorMixin) -> list[list[BatchShape]]:
    """Make some rows into sequences as the stage would, each by itself, and return the shapes of each row's sequences.

    :returns: One shape for a row, or in the contrastive stage one for each of its items.
    """
    sample = list(rows)
    if len(rows) > SAMPLE:
        # At random: rows of an image follow each other, and every n-th may be the same one of each image.
        sample = random.Random(recipe.seed).sample(sample, SAMPLE)
    section = recipe.section(stage)
    if isinstance(section, ContrastiveSection):
        return [
            [
                batch_shape(render_items(processor, [item]))
                for item in (row.query, row.positive, *row.negatives[: section.hard_negatives])
            ]
            for row in sample
        ]
    geometry = PatchGeometry.from_config(read_config(recipe.backbone))
    collate = reconstruction_collator(section, processor, geometry, seed=recipe.seed)
    return [[batch_shape(collate([example]))] for example in numbered(sample)]
