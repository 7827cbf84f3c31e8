"""The stages of a recipe in a row: each starts from the weights that the one before it wrote."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from transformers import Trainer, TrainingArguments, set_seed

from cocoa_embed.backbone import Backbone, load_backbone, resolve_backbone
from cocoa_embed.errors import UsageError
from cocoa_embed.export import build_sentence_transformer
from cocoa_embed.folders import RUN_MARKER, claim_folder
from cocoa_embed.images import one_line
from cocoa_embed.train.bridge import bridge_trainer
from cocoa_embed.train.contrastive import contrastive_trainer
from cocoa_embed.train.data import Row, read_image_folder
from cocoa_embed.train.progress import show_live_losses
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.record import StageResult, read_start, write_record
from cocoa_embed.train.sections import BridgeSection, ContrastiveSection, StageSection, WarmupSection
from cocoa_embed.train.warmup import warmup_trainer

STAGES = ("warmup", "bridge", "contrastive")

DECAY_SHARE = 0.3
"""Part of the steps over which ``warmup_stable_decay`` lets the learning rate fall."""

Inspect = Callable[[str, Trainer], None]


def run(recipe: Recipe, out: Path, *, inspect: Inspect | None = None) -> list[StageResult]:
    """Run the stages of ``recipe`` in order; each writes a checkpoint to ``out/<stage>``.

    What an earlier run left in ``out`` is removed, once data, settings and backbone have proved usable.

    :param inspect: Called with the stage's name and its trainer when it has ended, before what the stage throws away
        (the pixel decoder) is gone.

    :returns: The stages' results; the last one's folder is what :func:`cocoa_embed.export.export_model` takes.
    :raises UsageError: If the recipe has no stage, a stage has no data, or this machine cannot do what it asks for.
    :raises CocoaError: If data, backbone or output folder cannot be used, or a loss is not finite.
    """
    stages = [stage for stage in STAGES if getattr(recipe, stage) is not None]
    if not stages:
        raise UsageError(f"Recipe {recipe.name!r} has no stage; give at least one of {', '.join(STAGES)}.")
    _refuse_several_devices()
    _refuse_impossible_arguments(recipe, stages, out)
    rows = {stage: _read_rows(recipe, stage) for stage in stages}
    _refuse_to_overwrite_inputs(recipe, stages, out)
    start = read_start(recipe.backbone)
    # In a list, so that the stage can let go of it.
    loaded = [_load(recipe, recipe.backbone)]
    claim_folder(out, marker=RUN_MARKER)
    (out / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    results: list[StageResult] = []
    for stage in stages:
        backbone = loaded.pop if loaded else partial(_load, recipe, str(results[-1].folder))
        results.append(_run_stage(recipe, stage, backbone, rows[stage], out / stage, inspect))
        write_record(recipe, start, results)
    return results


def _refuse_several_devices() -> None:
    if PartialState().num_processes > 1 or torch.cuda.device_count() > 1:
        raise UsageError("Training runs on one device as yet; start one process and set CUDA_VISIBLE_DEVICES=0.")


def _refuse_impossible_arguments(recipe: Recipe, stages: list[str], out: Path) -> None:
    for stage in stages:
        try:
            TrainingArguments(**_training_arguments(recipe, getattr(recipe, stage), out / stage))
        except ValueError as error:
            raise UsageError(f"Recipe {recipe.name!r}, stage {stage}: {one_line(error)}") from error


def _refuse_to_overwrite_inputs(recipe: Recipe, stages: list[str], out: Path) -> None:
    backbone = resolve_backbone(recipe.backbone)
    read = [Path(backbone)] if Path(backbone).is_dir() else []
    read += [folder for stage in stages if (folder := recipe.data_of(stage).folder) is not None]
    for folder in read:
        if folder.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out} holds {folder}, which the run reads; give another output folder.")


def _run_stage(
    recipe: Recipe, stage: str, backbone: Callable[[], Backbone], rows: list[Row], folder: Path, inspect: Inspect | None
) -> StageResult:
    section: StageSection = getattr(recipe, stage)
    folder.mkdir()
    set_seed(recipe.seed)
    trainer, save = _trainer(recipe, section, backbone, rows, folder)
    show_live_losses(trainer, stage)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    if trainer.is_world_process_zero():
        save()
    if inspect is not None:
        inspect(stage, trainer)
    return StageResult(stage, folder, section.steps, len(rows), seconds, list(trainer.state.log_history))


def _trainer(
    recipe: Recipe, section: StageSection, load: Callable[[], Backbone], rows: list[Row], folder: Path
) -> tuple[Trainer, Callable[[], None]]:
    """Return a stage's trainer, and what writes the trained model to ``folder``."""
    arguments = _training_arguments(recipe, section, folder)
    if isinstance(section, ContrastiveSection):
        model = _embedding_model(recipe, load, folder)
        trainer = contrastive_trainer(model, rows, section, arguments=arguments)
        return trainer, partial(model.save, str(folder), create_model_card=False)
    backbone = load()
    if isinstance(section, BridgeSection):
        stage_trainer = bridge_trainer(backbone, rows, section, seed=recipe.seed, arguments=arguments)
    elif isinstance(section, WarmupSection):
        stage_trainer = warmup_trainer(backbone, rows, section, seed=recipe.seed, arguments=arguments)
    else:
        raise TypeError(f"no trainer for a {type(section).__name__}")
    return stage_trainer, partial(backbone.save, folder)


def _load(recipe: Recipe, start: str) -> Backbone:
    set_seed(recipe.seed)  # a mask token that needs a wider embedding matrix is drawn
    return load_backbone(
        start,
        attn_implementation=_attention(recipe),
        max_length=recipe.max_length,
        max_pixels=recipe.max_pixels,
    )


def _attention(recipe: Recipe) -> str:
    return "sdpa" if recipe.attn_implementation == "auto" else recipe.attn_implementation


def _embedding_model(recipe: Recipe, load: Callable[[], Backbone], folder: Path) -> SentenceTransformer:
    load().save(folder)
    return build_sentence_transformer(
        folder,
        prompts=recipe.prompts.model_dump(),
        attn_implementation=_attention(recipe),
    )


def _training_arguments(recipe: Recipe, section: StageSection, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": section.steps,
        "per_device_train_batch_size": section.batch_size,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.schedule,
        "lr_scheduler_kwargs": _schedule_arguments(section),
        "warmup_steps": section.warmup_steps,
        "weight_decay": section.weight_decay,
        "adam_beta2": section.adam_beta2,
        "logging_steps": section.logging_steps,
        "logging_nan_inf_filter": False,
        "bf16": recipe.mixed_precision == "bf16",
        "use_cpu": not torch.accelerator.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": recipe.seed,
    }


def _schedule_arguments(section: StageSection) -> dict[str, Any]:
    if section.schedule != "warmup_stable_decay":
        return {}
    return {"num_decay_steps": max(1, round(section.steps * DECAY_SHARE))}


def _read_rows(recipe: Recipe, stage: str) -> list[Row]:
    data = recipe.data_of(stage)
    if data.folder is None:
        raise UsageError(f"Recipe {recipe.name!r}: stage {stage} has no data; give data.folder or {stage}.data.folder.")
    rows = read_image_folder(data.folder, captions=data.captions, paraphrases=data.paraphrases, limit=data.limit)
    if stage == "contrastive" and len(rows) < 2:
        raise UsageError(f"{data.folder} has one row; contrastive learning tells rows apart, give it two or more.")
    return rows
