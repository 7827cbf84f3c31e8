"""The plan and the cost of a run, without loading weights: ``cocoa-embed train RECIPE --dry-run``."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedConfig, ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.model.backbone import load_processor, read_config
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.train.data.broken_rows import REMEDY
from cocoa_embed.train.data.mixture import Check, ReadRows
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.checkpoints import newest_complete, step_of
from cocoa_embed.train.loop.processes import by_first_process
from cocoa_embed.train.plan.advice import different_images, epoch_count
from cocoa_embed.train.plan.cards import CARDS
from cocoa_embed.train.plan.checks import CHECKPOINTS, Prepared, bad_rows, examine
from cocoa_embed.train.plan.cost import BatchShape, StepCost, batch_shape
from cocoa_embed.train.plan.fit import fit_to_card, memory_of
from cocoa_embed.train.plan.meter import ADAM_MOMENTS, FULL, StageMeter
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import SourceSettings, StageSettings
from cocoa_embed.train.stages.stage import Stage

DEFAULT_CARD = "h100"
"""The card of the estimates if none is named: memory is the same on all."""

SAMPLE = 256
"""Rows of a stage that are rendered to estimate the length of all."""


@dataclass(frozen=True)
class SubsetPlan:
    """The rows of a subset.

    :param rows: After caps and weights, without those left out.
    :param rows_with_image: Those of them with an image on either side.
    :param images: The number of distinct images that rows begin with.
    :param left_out: The number of rows that the stage cannot use.
    :param source: The settings of the source of the rows.
    """

    rows: int
    rows_with_image: int
    images: int
    left_out: int
    source: dict[str, Any]


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage, with estimates of its cost.

    :param rows: Rows by subset, after caps and weights.
    :param subsets: More about the rows of each subset.
    :param needs: What the rows that are left out lack, and what to do.
    :param max_rows: The cap that the rows of all subsets were drawn to, if there were more.
    :param step_contents: What a step holds, by subset, if all its rows are of one subset.
    :param steps: The steps of the whole stage; ``steps_done`` of them are in the checkpoint that it resumes from.
    :param epochs: How often the steps draw each row.
    :param mean_batch_size: The mean number of rows of a step; fewer than ``batch_size`` where rows run out.
    :param tokens_per_step: Tokens without padding, from a sample of the rows.
    :param flops: FLOPs of the remaining steps, forward and backward, from the same sample.
    :param rows_at_once: Rows that a device runs in one forward pass; in the contrastive stage, items.
    :param sizes_at_once: Sizes chosen to fit into memory, for each kind of sequence: ``rows``, ``tokens of texts``...
    :param gradient_checkpointing: Whether activations are recomputed.
    :param memory_bytes: Bytes on one device by use, if all rows of a forward pass are as long as the longest row of the
        sample, which includes the rows with the longest texts and the most images.
    :param checkpoint_bytes: Bytes of one checkpoint to resume from. While the stage trains, there are up to three, in
        ``checkpoints`` next to ``folder``.
    :param folder: The folder of the stage's weights.
    :param adapter: The kind of the stage's adapter, if it has one.
    :param seconds_per_step: The time of a step on this machine, if steps were timed.
    :param seconds: The time of the remaining steps on this machine, if steps were timed.
    :param card_seconds: The time of the remaining steps on one card, if one was named.
    """

    stage: str
    parameters: int
    trainable_parameters: int
    rows: dict[str, int]
    subsets: dict[str, SubsetPlan]
    needs: str
    max_rows: int | None
    step_contents: list[dict[str, Any]]
    steps: int
    steps_done: int
    epochs: float
    batch_size: int
    mean_batch_size: float
    rows_at_once: int
    sizes_at_once: dict[str, int]
    gradient_checkpointing: bool
    tokens_per_step: float
    flops: float
    memory_bytes: dict[str, int]
    checkpoint_bytes: int
    folder: str
    adapter: str | None
    seconds_per_step: float | None
    seconds: float | None
    card_seconds: float | None


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    :param devices: The number of devices.
    :param unchecked_images: The number of images that were not checked, in the stage that has most of them.
    :param card: The card of the stages' ``card_seconds``, if one was named.
    :param warnings: Settings that do not suit the rows, one sentence each.
    :param bad_rows: The rows to leave out, as in ``bad_rows.jsonl``.
    :param finished: The stages that are finished already.
    """

    recipe: str
    backbone: str
    devices: int
    unchecked_images: int
    card: str | None
    stages: list[StagePlan]
    warnings: list[str]
    bad_rows: list[dict[str, str]]
    finished: list[str]


def plan(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    check: Check = "sample",
    card: str | None = None,
    seconds_per_step: Callable[[Prepared], Mapping[str, float]] | None = None,
) -> RunPlan:
    """Return the plan of a run, or fail as the run would. Every process of the run calls this.

    :param resume: Plan what is left of the interrupted run in ``out``.
    :param check: Check all images, or a sample of them.
    :param card: Also estimate the time on this one of ``CARDS``.
    :param seconds_per_step: Measures the time of a step of each stage, by the stage's name.
    :raises UsageError: As ``run`` does.
    :raises CocoaError: As ``run`` does, except for missing or broken weights, which are not loaded.
    """
    prepared = by_first_process(lambda: examine(recipe, out, resume=resume, check=check))
    timed = {} if seconds_per_step is None else seconds_per_step(prepared)
    return by_first_process(lambda: _plan(prepared, out, card, timed))


def _plan(prepared: Prepared, out: Path, card: str | None, timed: Mapping[str, float]) -> RunPlan:
    recipe = prepared.recipe
    config = read_config(recipe.backbone)
    return RunPlan(
        recipe=recipe.name,
        backbone=recipe.backbone,
        devices=PartialState().num_processes,
        unchecked_images=max((read.unchecked for read in prepared.rows.values()), default=0),
        card=card,
        stages=[_plan_stage(prepared, name, config, out, card, timed.get(name)) for name in prepared.rows],
        warnings=prepared.warnings,
        bad_rows=[dataclasses.asdict(row) for row in bad_rows(prepared.rows)],
        finished=[result.stage for result in prepared.results],
    )


def _plan_stage(
    prepared: Prepared,
    name: str,
    config: PreTrainedConfig,
    out: Path,
    card: str | None,
    timed: float | None,
) -> StagePlan:
    stage, read, steps = prepared.recipe.stages[name], prepared.rows[name], prepared.steps[name]
    run, settings, data = stage.run, stage.settings, prepared.recipe.data_of(name)
    processor = load_processor(run.backbone, **run.limits)
    devices = PartialState().num_processes
    checkpoint = newest_complete(out / CHECKPOINTS / name) if prepared.is_resumed else None
    steps_done = 0 if checkpoint is None else step_of(checkpoint)
    sample, largest = (
        _sequences(stage, rows, processor, data.on_bad_row)
        for rows in (sample_rows(read.rows, run.seed), largest_rows(read.rows))
    )
    typical = _typical(sample)
    longest = max((each for of_row in sample + largest for each in of_row), key=lambda each: each.shape.tokens)
    measured = [longest, *(each for each, _ in typical)]
    meter = StageMeter(stage, config, processor, [each.alike for each in measured], CARDS[card or DEFAULT_CARD])
    chosen = fit_to_card(stage, meter, [each.shape for each in measured], devices, memory_of(card))
    at_once = [chosen.sequences(stage, devices, each.shape) for each in measured]
    counts, shards = meter.parameters, devices if run.sharding != "none" else 1
    batch_size = stage.mean_batch_size(read.rows)
    rows_on_device = stage.micro_batches(devices)[0] // devices
    patches, geometry = _mean(sample, lambda shape: shape.patches), family_of(config).geometry
    width, frames = geometry.patch_width, geometry.temporal_patch_size
    memory = {
        **meter.state_bytes(shards),
        "activations": round(meter.mini_batch(0, at_once[0]).peak_bytes),
        "inputs": round(rows_on_device * patches * (width // frames if stage.sends_uint8 else width * FULL)),
    }
    remaining = steps - steps_done
    on_card = meter.optimizer_seconds + sum(
        batch_size * a_row / at_once[place] * meter.mini_batch(place, at_once[place]).eager_seconds
        for place, (_, a_row) in enumerate(typical if card else (), 1)
    )
    return StagePlan(
        stage=name,
        parameters=counts.total,
        trainable_parameters=counts.trainable,
        rows=read.rows.counts,
        subsets=_subsets(read, prepared.recipe.sources_of(name)),
        needs=stage.needs,
        max_rows=len(read.rows) if len(read.rows) == data.max_rows else None,
        step_contents=stage.step_contents(read.rows),
        steps=steps,
        steps_done=steps_done,
        epochs=epoch_count(stage, read.rows, steps),
        batch_size=settings.batch_size,
        rows_at_once=at_once[0],
        sizes_at_once=chosen.sizes,
        gradient_checkpointing=chosen.recomputes,
        mean_batch_size=batch_size,
        tokens_per_step=batch_size * _mean(sample, lambda shape: shape.tokens),
        flops=remaining * batch_size * _mean(sample, StepCost.of(config, settings).of_shape),
        memory_bytes={"total": sum(memory.values()), **memory},
        checkpoint_bytes=(1 + ADAM_MOMENTS) * FULL * counts.trainable,
        folder=str(out / name),
        adapter=None if settings.adapter is None else settings.adapter.kind,
        seconds_per_step=timed,
        seconds=None if timed is None else remaining * timed,
        card_seconds=remaining * on_card if card else None,
    )


def _subsets(read: ReadRows, sources: Mapping[str, SourceSettings]) -> dict[str, SubsetPlan]:
    subset, with_image = read.rows.column("subset"), read.rows.column("images") > 0
    plans = {}
    for place, name in enumerate(read.rows.subsets):
        own = subset == place
        plans[name] = SubsetPlan(
            rows=int(own.sum()),
            rows_with_image=int((own & with_image).sum()),
            images=different_images(read.rows.select(np.flatnonzero(own))),
            left_out=read.left_out.get(name, 0),
            source=sources[name].model_dump(mode="json", exclude_none=True),
        )
    return plans


class _Sequence(NamedTuple):
    """The shape of a sequence, and a row for the meter, all of whose sequences have this shape."""

    shape: BatchShape
    alike: Row


def _sequences(
    stage: Stage[StageSettings], rows: RowTable, processor: ProcessorMixin, on_bad_row: str
) -> list[list[_Sequence]]:
    """Return each row's sequences.

    :raises CocoaError: If an image proves broken, and ``on_bad_row`` is ``stop``; ``skip`` leaves its row out.
    """
    found = []
    for example in numbered(rows):
        try:
            shapes = map(batch_shape, stage.sequences(example, processor))
            found.append([_Sequence(*pair) for pair in zip(shapes, stage.alike(example[1]), strict=True)])
        except ImageError as error:
            if on_bad_row == "stop":
                raise CocoaError(f"{error}. {REMEDY}") from error
    return found


def _mean(sample: list[list[_Sequence]], count: Callable[[BatchShape], float]) -> float:
    """Return the mean over rows of the sum of ``count`` over a row's sequences."""
    return fmean(sum(count(each.shape) for each in of_row) for of_row in sample)


def _typical(sample: list[list[_Sequence]]) -> list[tuple[_Sequence, float]]:
    """Return the sequence of median length with images and the one without, each with the number of such in a row."""
    every = [each for of_row in sample for each in of_row]
    kinds = [[each for each in every if bool(each.shape.patches) == pictured] for pictured in (True, False)]
    ordered = [sorted(kind, key=lambda each: each.shape.tokens) for kind in kinds if kind]
    return [(kind[len(kind) // 2], len(kind) / len(sample)) for kind in ordered]


def sample_rows(rows: RowTable, seed: int) -> RowTable:
    """Return at most ``SAMPLE`` of the rows.

    They are drawn at random: with a fixed number of rows per image, every n-th row may be the first of its image.
    """
    if len(rows) <= SAMPLE:
        return rows
    return rows.select(np.random.default_rng(seed).choice(len(rows), SAMPLE, replace=False))


def largest_rows(rows: RowTable) -> RowTable:
    """Return the row with the longest texts, with and without an image, and the row with the most images."""
    images, texts = rows.column("images"), rows.column("query_text") + rows.column("positive_text")
    return rows.select(np.array([texts.argmax(), (texts * (images > 0)).argmax(), images.argmax()]))
