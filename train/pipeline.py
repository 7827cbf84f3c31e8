"""The stages of a recipe in a row: each starts from the weights that the one before it wrote."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from transformers import Trainer, set_seed

from cocoa_embed.backbone import Backbone, load_backbone, resolve_backbone
from cocoa_embed.errors import UsageError
from cocoa_embed.export import TRAINING_FILE, build_sentence_transformer
from cocoa_embed.folders import claim_folder
from cocoa_embed.train.bridge import bridge_trainer
from cocoa_embed.train.contrastive import contrastive_trainer
from cocoa_embed.train.data import Row, read_image_folder
from cocoa_embed.train.progress import show_live_losses
from cocoa_embed.train.recipe import BridgeSection, ContrastiveSection, Recipe, StageSection, WarmupSection
from cocoa_embed.train.warmup import warmup_trainer

STAGES = ("warmup", "bridge", "contrastive")

DECAY_SHARE = 0.3
"""Part of the steps over which ``warmup_stable_decay`` lets the learning rate fall."""

Inspect = Callable[[str, Trainer], None]


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind.

    :param folder: Its checkpoint.
    :param seconds: Wall-clock time of its training loop.
    :param log: Its log lines: ``step`` and the figures of that step.
    """

    stage: str
    folder: Path
    steps: int
    seconds: float
    log: list[dict[str, float]]

    @property
    def final(self) -> dict[str, float]:
        """The last logged figure of each name."""
        return {name: value for line in self.log for name, value in line.items()}


def run(recipe: Recipe, out: Path, *, inspect: Inspect | None = None) -> list[StageResult]:
    """Run the stages of ``recipe`` in order; each writes a checkpoint to ``out/<stage>``.

    :param inspect: Called with the stage's name and its trainer when it has ended, before what the stage throws away
        (the pixel decoder) is gone.

    :returns: The stages' results; the last one's folder is what :func:`cocoa_embed.export.export_model` takes.
    :raises UsageError: If the recipe has no stage, or a stage has no data.
    :raises CocoaError: If data, backbone or output folder cannot be used.
    """
    sections = {stage: getattr(recipe, stage) for stage in STAGES if getattr(recipe, stage) is not None}
    if not sections:
        raise UsageError(f"Recipe {recipe.name!r} has no stage; give at least one of {', '.join(STAGES)}.")
    _refuse_several_devices()
    rows = {stage: _read_rows(recipe, stage) for stage in sections}
    _refuse_to_overwrite_inputs(recipe, list(sections), out)
    claim_folder(out, marker="recipe.json")
    (out / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    results: list[StageResult] = []
    start = recipe.backbone
    for stage in sections:
        results.append(_run_stage(recipe, stage, start, rows[stage], out / stage, inspect))
        _write_training(recipe, results, rows)
        start = str(out / stage)
    return results


def _refuse_several_devices() -> None:
    if PartialState().num_processes > 1 or torch.cuda.device_count() > 1:
        raise UsageError("Training runs on one device as yet; start one process and set CUDA_VISIBLE_DEVICES=0.")


def _refuse_to_overwrite_inputs(recipe: Recipe, stages: list[str], out: Path) -> None:
    backbone = resolve_backbone(recipe.backbone)
    read = [Path(backbone)] if Path(backbone).is_dir() else []
    read += [folder for stage in stages if (folder := recipe.data_of(stage).folder) is not None]
    for folder in read:
        if folder.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out} holds {folder}, which the run reads; give another output folder.")


def _run_stage(
    recipe: Recipe, stage: str, start: str, rows: list[Row], folder: Path, inspect: Inspect | None
) -> StageResult:
    set_seed(recipe.seed)
    section: WarmupSection | BridgeSection | ContrastiveSection = getattr(recipe, stage)
    arguments = _training_arguments(recipe, section, folder)
    folder.mkdir()
    if isinstance(section, ContrastiveSection):
        model = _embedding_model(recipe, start, folder)
        trainer: Trainer = contrastive_trainer(model, rows, section, arguments=arguments)
        save = partial(model.save, str(folder), create_model_card=False)
    else:
        backbone = _load(recipe, start)
        if isinstance(section, BridgeSection):
            trainer = bridge_trainer(backbone, rows, section, seed=recipe.seed, arguments=arguments)
        else:
            trainer = warmup_trainer(backbone, rows, section, seed=recipe.seed, arguments=arguments)
        save = partial(backbone.save, folder)
    show_live_losses(trainer, stage)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    if trainer.is_world_process_zero():
        save()
    if inspect is not None:
        inspect(stage, trainer)
    return StageResult(stage, folder, section.steps, seconds, list(trainer.state.log_history))


def _load(recipe: Recipe, start: str) -> Backbone:
    return load_backbone(
        start,
        attn_implementation=recipe.attn_implementation,
        max_length=recipe.max_length,
        max_pixels=recipe.max_pixels,
    )


def _embedding_model(recipe: Recipe, start: str, folder: Path) -> SentenceTransformer:
    _load(recipe, start).save(folder)
    return build_sentence_transformer(
        folder, prompts=recipe.prompts.model_dump(), attn_implementation=recipe.attn_implementation
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
        "logging_steps": min(section.logging_steps, section.steps),
        "bf16": recipe.mixed_precision == "bf16",
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
    return read_image_folder(data.folder, captions=data.captions, paraphrases=data.paraphrases, limit=data.limit)


def _write_training(recipe: Recipe, results: list[StageResult], rows: dict[str, list[Row]]) -> None:
    training = {
        "recipe": recipe.model_dump(mode="json"),
        "stages": [
            {
                "stage": result.stage,
                "steps": result.steps,
                "seconds": round(result.seconds, 1),
                "rows": len(rows[result.stage]),
                "final": result.final,
            }
            for result in results
        ],
        "data": "; ".join(f"{r.stage}: {len(rows[r.stage])} rows of {recipe.data_of(r.stage).folder}" for r in results),
    }
    folder = results[-1].folder
    (folder / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    (folder / "log.json").write_text(json.dumps(results[-1].log, indent=2) + "\n", encoding="utf-8")
