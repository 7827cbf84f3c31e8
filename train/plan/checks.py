"""Checks before a run loads weights, removes an earlier run or trains a step."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainingArguments

from cocoa_embed.errors import CocoaError, UsageError, one_line
from cocoa_embed.folders import (
    RUN_MARKER,
    claim_folder,
    refuse_foreign_folder,
    refuse_to_overwrite,
    write_atomically,
)
from cocoa_embed.model.backbone import (
    fitting_max_pixels,
    load_backbone,
    load_processor,
    read_config,
    resolve_backbone,
)
from cocoa_embed.model.training_record import RUN_FILE, TRAINING_FILE, read_run, read_training, write_run
from cocoa_embed.train.data.mixture import Check, ReadRows
from cocoa_embed.train.data.rows import BadRow
from cocoa_embed.train.loop.checkpoints import remove_unfinished
from cocoa_embed.train.loop.processes import meet
from cocoa_embed.train.loop.run_record import StageResult, Start, finished_stages, new_run, read_start
from cocoa_embed.train.plan.advice import advise
from cocoa_embed.train.plan.stage_rows import read_stages
from cocoa_embed.train.recipe import Recipe, missing_paths

CHECKPOINTS = "checkpoints"
"""The folder in a run's folder with the checkpoints to resume from, until the stage is finished."""

BAD_ROWS_FILE = "bad_rows.jsonl"

NOT_LEARNED = frozenset(
    {
        *("workers", "report_to", "mini_batch_size", "mini_batch_tokens", "gradient_checkpointing", "compile"),
        *("probe_steps", "save_steps", "save_minutes", "on_bad_row", "vision_cache", "vision_cache_gb"),
    }
)
"""Settings that may change when a run is resumed: they do not affect the weights, or the rows are compared for it."""

INHERITED = ("prompts", "max_length", "max_pixels", "bidirectional", "pooling", "eos_tokens")
"""Settings that a run inherits from the checkpoint that it starts from."""

_CANNOT_SHARD = (DistributedType.NO, DistributedType.MULTI_CPU)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A checked run.

    :param recipe: The recipe, with inherited settings.
    :param start: The origin of its weights.
    :param rows: The rows of each unfinished stage.
    :param steps: The optimisation steps of each unfinished stage.
    :param warnings: Settings that do not suit the rows, one sentence each.
    :param results: The results of the finished stages.
    :param is_resumed: Whether it resumes an interrupted run.
    """

    recipe: Recipe
    start: Start
    rows: dict[str, ReadRows]
    steps: dict[str, int]
    warnings: list[str]
    results: list[StageResult] = field(default_factory=list)
    is_resumed: bool = False


def prepare(recipe: Recipe, out: Path, *, resume: bool) -> Prepared:
    """Check a recipe against data, machine and output folder, and set the folder up.

    :param resume: Resume the run in ``out``, if any.
    :raises UsageError: As ``examine`` does.
    :raises CocoaError: As ``examine`` does, or if the folder cannot be written.
    """
    prepared = examine(recipe, out, resume=resume)
    for warning in prepared.warnings:
        logger.warning(warning)
    if prepared.is_resumed:
        for stage in prepared.rows:
            remove_unfinished(out / stage)
    else:
        if (out / RUN_MARKER).is_file():
            load_backbone(recipe.backbone)  # broken weights fail before an earlier run is removed
        claim_folder(out, marker=RUN_MARKER)
        if bad := bad_rows(prepared.rows):
            write_atomically(out / BAD_ROWS_FILE, "".join(f"{json.dumps(asdict(row))}\n" for row in bad))
        write_run(out, new_run(prepared.recipe, prepared.start, prepared.rows, prepared.steps))
    return prepared


def _left_out(out: Path) -> set[tuple[str, str]]:
    """Return the subsets and sources of the rows that the run in a folder has left out."""
    file = out / BAD_ROWS_FILE
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.is_file() else ())
    return {(row["subset"], row["source"]) for row in rows}


def bad_rows(rows: Mapping[str, ReadRows]) -> list[BadRow]:
    """Return the rows that stages leave out, each once, with the names of these stages."""
    stages: dict[BadRow, list[str]] = {}
    for stage, read in rows.items():
        for row in dict.fromkeys(read.bad):
            stages.setdefault(row, []).append(stage)
    return [replace(row, stages=tuple(those)) for row, those in stages.items()]


def examine(recipe: Recipe, out: Path, *, resume: bool = False, check: Check = "all") -> Prepared:
    """Check a recipe against data, machine and output folder, without changing any file.

    :param check: Check all images, or a sample of them; a resumed run checks all.
    :raises UsageError: If the recipe has no stage, a stage has no data, this machine cannot run it, or the interrupted
        run had another recipe or other rows.
    :raises CocoaError: If data, backbone or output folder cannot be used.
    """
    if missing := missing_paths(type(recipe), recipe.model_dump()):
        raise CocoaError(f"Recipe {recipe.name!r}: {'; '.join(missing)}.")
    recipe = _limit_images(_inherit(recipe))
    _check_stages(recipe)
    config = read_config(recipe.backbone)
    for stage in recipe.stages.values():
        stage.check_backbone(config)
    for run in {stage.run.max_pixels: stage.run for stage in recipe.stages.values()}.values():
        load_processor(run.backbone, **run.limits)
    refuse_foreign_folder(out, marker=RUN_MARKER)
    refuse_to_overwrite(out, _inputs(recipe))
    resume = resume and (out / RUN_MARKER).is_file() and (out / RUN_FILE).is_file()
    if resume:
        _refuse_another_recipe(recipe, out)
    results = finished_stages(recipe, out) if resume else []
    start = read_start(recipe.backbone)
    # A sample may miss a broken image that the run has left out, and the rows would then differ.
    names, left_out = list(recipe.stages)[len(results) :], _left_out(out) if resume else None
    rows = read_stages(recipe, names, check="all" if resume else check, left_out=left_out)
    steps = {stage: recipe.stages[stage].step_count(read.rows) for stage, read in rows.items()}
    _refuse_impossible_arguments(recipe, steps, out)
    if resume:
        _refuse_other_rows(rows, out)
    warnings = [
        warning for name, read in rows.items() for warning in advise(recipe.stages[name], read.rows, steps[name])
    ]
    return Prepared(recipe, start, rows, steps, warnings, results, is_resumed=resume)


def _inherit(recipe: Recipe) -> Recipe:
    """Return the recipe; if its backbone is a checkpoint, add the ``INHERITED`` settings that it leaves out."""
    folder = Path(recipe.backbone)
    if not (folder / TRAINING_FILE).is_file():
        return recipe
    training = read_training(folder)
    own = recipe.model_dump(mode="json", include=set(INHERITED))
    earlier = own | training["recipe"]
    for last in training["stages"][-1:]:
        earlier["max_pixels"] = (earlier.get(last["stage"]) or {}).get("max_pixels") or earlier["max_pixels"]
    taken = {key: earlier[key] for key in INHERITED if key not in recipe.model_fields_set and earlier[key] != own[key]}
    if taken:
        listed = ", ".join(f"{key} {json.dumps(value)}" for key, value in taken.items())
        logger.warning("inherited from %s: %s", folder, listed)
    return recipe.parse({**recipe.model_dump(exclude_unset=True), **taken}, source=str(folder))


def _limit_images(recipe: Recipe) -> Recipe:
    """Return the recipe; add an image limit if it has none and the backbone's own is too large for ``max_length``."""
    has_limits = all(stage.run.max_pixels for stage in recipe.stages.values())
    pixels = None if has_limits else fitting_max_pixels(recipe.backbone, recipe.max_length, recipe.eos_tokens)
    if pixels is None:
        return recipe
    logger.warning(
        f"Images are scaled down to {pixels} pixels, so that they fit into max_length {recipe.max_length}: the limit "
        f"of {recipe.backbone} allows larger ones. Set max_pixels to choose another limit."
    )
    return recipe.parse({**recipe.model_dump(exclude_unset=True), "max_pixels": pixels}, source=recipe.name)


def _check_stages(recipe: Recipe) -> None:
    """Check that a recipe has stages, that each names its rows, and that this machine can run it."""
    state = meet()
    if not recipe.stages:
        raise UsageError(f"Recipe {recipe.name!r} has no stage; give at least one of {', '.join(recipe.registry())}.")
    for service in recipe.report_to:
        if find_spec(service) is None:
            raise UsageError(f"report_to names {service}, which is not installed; run: pip install {service}")
    is_sharded, sharding = recipe.sharding != "none", f"sharding={recipe.sharding}"
    if is_sharded and state.distributed_type in _CANNOT_SHARD:
        # transformers would silently train without sharding
        raise UsageError(f"{sharding} needs several accelerators, with one process for each.")
    for name, stage in recipe.stages.items():
        recipe.sources_of(name)
        stage.attention()
        if is_sharded and not stage.can_shard:
            raise UsageError(
                f"{sharding} does not work in stage {name}; run the other stages with {name}=null, then {name} from "
                "their checkpoint with sharding=none."
            )
        if is_sharded and stage.settings.adapter is not None:
            raise UsageError(f"{sharding} does not work with adapters; leave out sharding or {name}.adapter.")


def _recipe_changes(before: dict[str, Any], after: dict[str, Any], *, prefix: str = "") -> list[str]:
    """Return the differences of two recipes as ``key.sub: before -> after``, without ``NOT_LEARNED``."""
    changes = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        name = f"{prefix}{key}"
        if old == new or key in NOT_LEARNED:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _recipe_changes(old, new, prefix=f"{name}.")
        else:
            changes.append(f"{name}: {json.dumps(old)} -> {json.dumps(new)}")
    return changes


def _refuse_another_recipe(recipe: Recipe, out: Path) -> None:
    if changes := _recipe_changes(read_run(out)["recipe"], recipe.model_dump(mode="json")):
        raise UsageError(
            f"The recipe has changed since the run in {out} began ({'; '.join(changes)}); resume it with the recipe "
            "that it began with, or start again in another folder."
        )


def _refuse_other_rows(rows: dict[str, ReadRows], out: Path) -> None:
    before = read_run(out)["stages"]
    for stage, read in rows.items():
        if before[stage]["fingerprint"] != read.rows.fingerprint:
            raise UsageError(
                f"The rows of stage {stage} have changed since the run in {out} began (then {before[stage]['rows']}, "
                f"now {read.rows.counts}); restore them, or start again in another folder."
            )


def _refuse_impossible_arguments(recipe: Recipe, steps: dict[str, int], out: Path) -> None:
    for name, count in steps.items():
        stage = recipe.stages[name]
        try:
            TrainingArguments(**stage.arguments(steps=count, folder=out / CHECKPOINTS / name))
        except ValueError as error:
            raise UsageError(f"Recipe {recipe.name!r}, stage {name}: {one_line(error)}") from error
        late = [step for step in stage.settings.snapshot_steps if step >= count]
        if late:
            raise UsageError(
                f"{name}.snapshot_steps has step {late[0]}, but the stage ends at step {count}, whose weights are "
                "saved anyway; give earlier steps."
            )


def _inputs(recipe: Recipe) -> list[Path]:
    """Return the local files, globs and folders that a run reads."""
    backbone = Path(resolve_backbone(recipe.backbone))
    sources = [source for stage in recipe.stages for source in recipe.sources_of(stage).values()]
    given = [path for s in sources for path in (s.folder, s.file, s.webdataset, s.mmeb, s.hub, s.images)
             if path and "://" not in str(path)]  # fmt: skip
    return [*([backbone] if backbone.is_dir() else []), *map(Path, given)]
