"""What can go wrong before the first step, found before weights are loaded and before anything is removed."""

import json
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainingArguments

from cocoa_embed.data.rows import ItemImage
from cocoa_embed.errors import UsageError, one_line
from cocoa_embed.folders import RUN_MARKER, claim_folder, refuse_foreign_folder
from cocoa_embed.model.backbone import load_backbone, load_processor, read_config, resolve_backbone
from cocoa_embed.model.training_record import RUN_FILE, read_run, write_run
from cocoa_embed.train.data.image_check import ImageSize
from cocoa_embed.train.data.mixture import ReadRows, read_rows, write_bad_rows
from cocoa_embed.train.data.rows import BadRow
from cocoa_embed.train.loop.arguments import checking_worker_count, stage_attention, step_count, training_arguments
from cocoa_embed.train.loop.processes import meet
from cocoa_embed.train.loop.run_record import StageResult, Start, finished_stages, new_run, read_start
from cocoa_embed.train.loop.snapshots import refuse_steps_past_the_end, remove_unfinished
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.stages.collators import lacks_block_b
from cocoa_embed.train.stages.contrastive import matryoshka_dims

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds what a stage resumes from, until the stage is finished."""

BAD_ROWS_FILE = "bad_rows.jsonl"

NOT_LEARNED = frozenset(
    {"workers", "report_to", "micro_batch_size", "cache_chunk", "gradient_checkpointing", "probe_steps"}
)
"""What may change between the parts of a run: how it fits a machine and how often it is measured."""

_CANNOT_SHARD = (DistributedType.NO, DistributedType.MULTI_CPU)


@dataclass(frozen=True)
class Prepared:
    """What a run has to do.

    :param start: Where its weights are from.
    :param rows: The rows of each stage that is still to be run.
    :param steps: Its optimisation steps.
    :param results: Of the stages that are finished already.
    :param is_resumed: It goes on with a run that was ended.
    """

    start: Start
    rows: dict[str, ReadRows]
    steps: dict[str, int]
    results: list[StageResult] = field(default_factory=list)
    is_resumed: bool = False


def prepare(recipe: Recipe, out: Path, *, resume: bool, progress: bool = True) -> Prepared:
    """Check a recipe against data, machine and output folder, and make the folder ready.

    :param resume: Go on with the run in ``out``, where there is one.
    :raises UsageError: As ``examine`` does.
    :raises CocoaError: As ``examine`` does, or if the folder cannot be written.
    """
    prepared = examine(recipe, out, resume=resume, progress=progress)
    if prepared.is_resumed:
        for stage in prepared.rows:
            remove_unfinished(out / stage)
    else:
        if out.is_dir() and any(out.iterdir()):
            load_backbone(recipe.backbone)  # weights that cannot be used are not worth the loss of an earlier run
        claim_folder(out, marker=RUN_MARKER)
        write_bad_rows(out / BAD_ROWS_FILE, bad_rows(prepared))
        write_run(out, new_run(recipe, prepared.start, prepared.rows, prepared.steps))
    return prepared


def bad_rows(prepared: Prepared) -> list[BadRow]:
    """Return the rows that stages leave out, each once, with the stages that do."""
    stages: dict[BadRow, list[str]] = {}
    for stage, read in prepared.rows.items():
        for row in dict.fromkeys(read.bad):
            stages.setdefault(row, []).append(stage)
    return [replace(row, stages=tuple(those)) for row, those in stages.items()]


def examine(recipe: Recipe, out: Path, *, resume: bool = False, progress: bool = True) -> Prepared:
    """Check a recipe against data, machine and output folder, and change nothing.

    :raises UsageError: If the recipe has no stage, a stage has no data, this machine cannot do what it asks for, or the
        run to be resumed had another recipe or other rows.
    :raises CocoaError: If data, backbone or output folder cannot be used.
    """
    check_stages(recipe)
    check_backbone(recipe)
    refuse_foreign_folder(out, marker=RUN_MARKER)
    _refuse_to_overwrite_inputs(recipe, out)
    resume = resume and _is_started(out)
    if resume:
        _refuse_another_recipe(recipe, out)
    results = finished_stages(recipe, out) if resume else []
    left = recipe.stages[len(results) :]
    start = read_start(recipe.backbone)
    rows = read_stages(recipe, left, progress=progress)
    steps = {stage: step_count(recipe.section(stage), len(rows[stage].rows)) for stage in left}
    _refuse_impossible_arguments(recipe, steps, out)
    refuse_steps_past_the_end(recipe, steps)
    if resume:
        _refuse_other_rows(rows, out)
    return Prepared(start, rows, steps, results, is_resumed=resume)


def check_stages(recipe: Recipe) -> None:
    """Check that a recipe has stages, that each says where its rows are, and that this machine can run it.

    :raises UsageError: If not.
    """
    state = meet()
    if not recipe.stages:
        raise UsageError(f"Recipe {recipe.name!r} has no stage; give at least one of warmup, bridge, contrastive.")
    for name in recipe.report_to:
        if find_spec(name) is None:
            raise UsageError(f"report_to names {name}, which is not installed; run: pip install {name}")
    for stage in recipe.stages:
        recipe.sources_of(stage)
        stage_attention(recipe, stage)
    if recipe.sharding != "none" and state.distributed_type in _CANNOT_SHARD:
        # transformers would leave the weights whole without a word.
        raise UsageError(f"sharding={recipe.sharding} needs several accelerators, with a process each.")
    if recipe.sharding != "none" and recipe.contrastive is not None:
        raise UsageError(
            f"sharding={recipe.sharding} is for the first two stages; run them with contrastive=null, then the "
            "contrastive stage from their checkpoint with sharding=none."
        )
    for stage in recipe.stages:
        if recipe.sharding != "none" and recipe.section(stage).adapter is not None:
            raise UsageError(f"sharding={recipe.sharding} takes no adapters; leave out sharding or {stage}.adapter.")


def check_backbone(recipe: Recipe) -> None:
    """Check that a recipe's backbone is of a supported kind, and its processor fit for the recipe's limits.

    :raises CocoaError: If not.
    """
    config = read_config(recipe.backbone)
    if recipe.contrastive is not None:
        matryoshka_dims(recipe.contrastive, config.get_text_config().hidden_size)
    load_processor(recipe.backbone, max_length=recipe.max_length, max_pixels=recipe.max_pixels)


def read_stages(recipe: Recipe, stages: list[str], *, progress: bool) -> dict[str, ReadRows]:
    """Read the rows of stages; what several stages share is read once.

    :raises CocoaError: If the data cannot be used.
    """
    read: dict[str, ReadRows] = {}
    checked: dict[ItemImage, ImageSize | str] = {}
    rows = {}
    for stage in stages:
        data = recipe.data_of(stage)
        key = data.model_dump_json() + stage * (stage == "bridge")
        if key not in read:
            read[key] = read_rows(
                recipe.sources_of(stage),
                on_bad_row=data.on_bad_row,
                seed=recipe.seed,
                workers=checking_worker_count(recipe),
                progress=progress,
                checked=checked,
                refuse=lacks_block_b if stage == "bridge" else None,
            )
        rows[stage] = read[key]
        if stage == "contrastive" and len(rows[stage].rows) < 2:
            raise UsageError("The contrastive stage has one row; it tells rows apart, give it two or more.")
    return rows


def recipe_changes(before: dict[str, Any], after: dict[str, Any], *, place: str = "") -> list[str]:
    """Return what differs between two recipes as ``key.sub: before -> after``; ``NOT_LEARNED`` is left out."""
    changes = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        name = f"{place}{key}"
        if old == new or key in NOT_LEARNED:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changes += recipe_changes(old, new, place=f"{name}.")
        else:
            changes.append(f"{name}: {json.dumps(old)} -> {json.dumps(new)}")
    return changes


def _is_started(out: Path) -> bool:
    return (out / RUN_MARKER).is_file() and (out / RUN_FILE).is_file()


def _refuse_another_recipe(recipe: Recipe, out: Path) -> None:
    changes = recipe_changes(read_run(out)["recipe"], recipe.model_dump(mode="json"))
    if changes:
        raise UsageError(
            f"The recipe has changed since the run in {out} began ({'; '.join(changes)}); resume it with the recipe as "
            "it was, or start anew in another folder."
        )


def _refuse_other_rows(rows: dict[str, ReadRows], out: Path) -> None:
    before = read_run(out)["stages"]
    for stage, read in rows.items():
        if before[stage]["fingerprint"] != read.fingerprint:
            raise UsageError(
                f"The rows of stage {stage} have changed since the run in {out} began (then {before[stage]['rows']}, "
                f"now {read.counts}); restore them, or start anew in another folder."
            )


def _refuse_impossible_arguments(recipe: Recipe, steps: dict[str, int], out: Path) -> None:
    for stage, count in steps.items():
        arguments = training_arguments(recipe, stage, steps=count, folder=out / CHECKPOINTS / stage)
        try:
            TrainingArguments(**arguments)
        except ValueError as error:
            raise UsageError(f"Recipe {recipe.name!r}, stage {stage}: {one_line(error)}") from error


def _refuse_to_overwrite_inputs(recipe: Recipe, out: Path) -> None:
    backbone = resolve_backbone(recipe.backbone)
    read = [Path(backbone)] if Path(backbone).is_dir() else []
    for stage in recipe.stages:
        for source in recipe.sources_of(stage).values():
            read += [
                Path(given) for given in (source.folder, source.file, source.mmeb, source.hub, source.images) if given
            ]
    for path in read:
        if path.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out} holds {path}, which the run reads; give another output folder.")
