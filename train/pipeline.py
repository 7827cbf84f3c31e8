"""Run the stages of a recipe in order: each starts from the weights that the one before it wrote."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from transformers import ProcessorMixin, Trainer, set_seed

from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import RUN_MARKER, only_writer
from cocoa_embed.model.backbone import Backbone, load_backbone, load_processor
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.train.data.broken_rows import unbroken
from cocoa_embed.train.data.image_patches import trim_memory
from cocoa_embed.train.data.lengths import row_lengths
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.callbacks import (
    TENSORBOARD,
    SaveAndStop,
    SaveSnapshots,
    Stopped,
    end_reports,
    show_progress,
    write_tensorboard,
)
from cocoa_embed.train.loop.checkpoints import explain_full_disk, newest_complete, read_complete, snapshot_folder
from cocoa_embed.train.loop.memory_trial import fit_to_memory, recompute_activations
from cocoa_embed.train.loop.oom import explain_out_of_memory
from cocoa_embed.train.loop.processes import by_first_process, refuse_idle_accelerators, taking_turns
from cocoa_embed.train.loop.run_record import RecordProgress, StageResult, record_begin, update_stage, write_record
from cocoa_embed.train.loop.trainer import CocoaTrainer, StageContext
from cocoa_embed.train.plan.checks import CHECKPOINTS, Prepared, prepare
from cocoa_embed.train.plan.cost import StepCost, measure_matmul_flops
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.rendering import joined, render_items
from cocoa_embed.train.stages.samples import stage_samples
from cocoa_embed.train.stages.stage import Stage

MERGED_ROWS = 16
"""Rows to try for the check of an adapter's merge, those with images first; the first unbroken one is used."""

Inspect = Callable[[str, Trainer], None]


def run(recipe: Recipe, out: str | Path, *, resume: bool = False, inspect: Inspect | None = None) -> list[StageResult]:
    """Run the stages of ``recipe`` in order; each writes a checkpoint to ``out/<stage>``.

    Every process that a launcher has started calls this; the first one checks, writes and prints. Without ``resume``,
    an earlier run in ``out`` is removed, once data, settings and backbone have proved usable.

    :param resume: Continue the interrupted run in ``out``; if there is none, start a new one.
    :param inspect: Called with each stage's name and its trainer at the end of the stage, while the parts that are not
        saved (the pixel decoder) still exist.
    :returns: The stages' results; ``export_model`` takes the folder of the last one.
    :raises UsageError: If the recipe has no stage, a stage has no data, this machine cannot run it, or the interrupted
        run had another recipe or other rows.
    :raises Stopped: If SIGTERM or Ctrl-C has stopped the run; it can be resumed.
    :raises CocoaError: If data, backbone or output folder cannot be used, another run writes to it, or a loss is not
        finite.
    """
    refuse_idle_accelerators()
    out = Path(out)
    with ExitStack() as stack:

        def lock_and_prepare() -> Prepared:
            stack.enter_context(only_writer(out, marker=RUN_MARKER))
            return prepare(recipe, out, resume=resume)

        prepared = by_first_process(lock_and_prepare)
        results = list(prepared.results)
        for name in prepared.rows:
            stage = prepared.recipe.stages[name]
            with explain_out_of_memory(name, stage.weights_remedies()):
                results.append(_run_stage(stage, prepared, results, out, inspect))
            clear_device_cache(garbage_collection=True)  # trainers, their callbacks and the model refer to each other
        if PartialState().is_main_process:
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return results


def _run_stage(
    stage: Stage[StageSettings], prepared: Prepared, before: list[StageResult], out: Path, inspect: Inspect | None
) -> StageResult:
    """Train a stage, or the steps that remain of it, and write its weights, its record and its samples."""
    name, recipe = stage.name, prepared.recipe
    checkpoints = out / CHECKPOINTS / name
    checkpoint = newest_complete(checkpoints)
    rows = prepared.rows[name].rows
    held_out, _ = stage.held_out(rows)
    with taking_turns():  # the host may have room for the weights of one process only, until they are on its device
        backbone = load_weights(stage, str(before[-1].folder) if before else recipe.backbone)
        processor = backbone.processor
        context = stage_context(stage, prepared, backbone, checkpoints)
        trainer = stage.trainer(backbone, rows, context)
        del backbone  # frees the head if the trainer does not use it
        trim_memory()
    choose_sizes(stage, trainer, rows)
    trainer.resume_clock(0.0 if checkpoint is None else float(read_complete(checkpoint)["seconds"]))
    save = partial(_save, stage, prepared, before, trainer, processor)
    if trainer.is_world_process_zero():
        record_begin(out, name, trainer, held_out)
    trainer.add_callback(RecordProgress(out, name, trainer))
    snapshots = stage.settings.snapshot_steps
    trainer.add_callback(SaveSnapshots(snapshots, lambda step: save(snapshot_folder(out / name, step))))
    stop = SaveAndStop(trainer, stage.settings.save_minutes)
    trainer.add_callback(stop)
    show_progress(trainer, name, stage.shown_metrics)
    if TENSORBOARD in recipe.report_to:
        write_tensorboard(trainer, out / TENSORBOARD / name)
    stop.train(checkpoint, name)
    if inspect is not None:
        inspect(name, trainer)
    result = save(out / name)
    samples = stage_samples(trainer, stage, processor, rows, held_out)
    if trainer.is_world_process_zero():
        record = {"step": result.steps, "seconds": result.seconds, "log": result.log, "facts": result.facts}
        update_stage(out, name, finished=True, samples=samples, **record)
        shutil.rmtree(checkpoints, ignore_errors=True)
        end_reports(recipe.report_to)
    trainer.accelerator.wait_for_everyone()
    if name != list(recipe.stages)[-1] and stop.any_requested():
        raise Stopped(stop.requested, f"at the end of stage {name}")
    return result


def load_weights(stage: Stage[StageSettings], start: str) -> Backbone:
    """Load the backbone that a stage starts from, by folder or by name."""
    run, attention = stage.run, stage.attention()
    set_seed(run.seed)  # a new mask token may widen the embedding matrix, which draws random weights
    backbone = load_backbone(start, attn_implementation=attention, bidirectional=run.bidirectional, **run.limits)
    if start != run.backbone:  # an earlier stage may have scaled images further down
        backbone = replace(backbone, processor=load_processor(run.backbone, **run.limits))
    if run.gradient_checkpointing is True:
        recompute_activations(backbone.model, on=True)
    return backbone


def choose_sizes(stage: Stage[StageSettings], trainer: CocoaTrainer, rows: RowTable) -> None:
    """Choose a stage's ``auto`` settings by the memory of the devices; every process calls this before training.

    Nothing is tried on a CPU or with sharded weights; with these, ``auto`` always recomputes activations.
    """
    recompute = stage.run.gradient_checkpointing
    if trainer.is_fsdp_enabled and recompute == "auto":
        recompute_activations(trainer.model, on=True)
    elif trainer.accelerator.device.type != "cpu" and not trainer.is_fsdp_enabled:
        fit_to_memory(trainer, stage.trials(trainer, rows), recompute)


def stage_context(
    stage: Stage[StageSettings], prepared: Prepared, backbone: Backbone, checkpoints: Path
) -> StageContext:
    """Return the arguments of a stage's trainer that come from the run."""
    recipe, layers = prepared.recipe, sorted(backbone.model._no_split_modules or ())
    dtype = torch.bfloat16 if recipe.mixed_precision == "bf16" else torch.float32
    return StageContext(
        arguments=stage.arguments(steps=prepared.steps[stage.name], folder=checkpoints, layers=layers),
        lengths_of=partial(row_lengths, processor=backbone.processor, sizes=prepared.rows[stage.name].sizes),
        on_bad_row=recipe.data_of(stage.name).on_bad_row,
        flops_of=StepCost.of(backbone.model.config, stage.settings),
        peak_flops=measure_matmul_flops(torch.device(str(PartialState().device)), dtype),
        memory_remedy=stage.memory_remedy(),
        checkpoint_facts={"stage": stage.name, "recipe": recipe.model_dump(mode="json")},
        compile=recipe.compile,
    )


def _save(
    stage: Stage[StageSettings],
    prepared: Prepared,
    before: Sequence[StageResult],
    trainer: CocoaTrainer,
    processor: ProcessorMixin,
    folder: Path,
) -> StageResult:
    """Write a stage's weights, then the record of their training, which marks them as complete."""
    rows = prepared.rows[stage.name].rows
    with trainer.throughput.paused():
        if trainer.is_world_process_zero():
            (folder / TRAINING_FILE).unlink(missing_ok=True)  # of an earlier attempt: the weights are not complete yet
        adapter = trainer.adapter if trainer.is_world_process_zero() else None
        if adapter is not None:  # the merge is checked on a row, with an image if any row has one
            with_image_first = np.argsort(rows.column("images") == 0, kind="stable")
            usable = unbroken(rows.select(with_image_first[:MERGED_ROWS]), "skip")
            if not usable:
                raise CocoaError("No image can be read to check the merge of the adapter; repair the images, then run "
                                 "again with --resume.")  # fmt: skip
            adapter.merge(render_items(processor, [joined(usable[0])]))
        with explain_full_disk(f"The weights of stage {stage.name}"):
            stage.save(trainer, processor, folder)
        state = trainer.state
        log: list[dict[str, Any]] = list(state.log_history)
        result = StageResult(stage.name, folder, state.global_step, len(rows), trainer.seconds(), log, stage.facts())
        if trainer.is_world_process_zero():
            write_record(prepared.recipe, prepared.start, [*before, result])
        if adapter is not None:
            adapter.return_to(trainer.accelerator.device)
    return result
