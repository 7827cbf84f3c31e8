"""The stages of a recipe in a row: each starts from the weights that the one before it wrote."""

import gc
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from transformers import Trainer, set_seed

from cocoa_embed.errors import CocoaError
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.train.loop.checkpoints import newest_complete, read_complete, step_of
from cocoa_embed.train.loop.oom import explained_shortage
from cocoa_embed.train.loop.processes import by_first_process, refuse_idle_accelerators
from cocoa_embed.train.loop.progress import TENSORBOARD, end_reports, show_live_losses, write_tensorboard
from cocoa_embed.train.loop.run_record import (
    RecordProgress,
    StageResult,
    record_begin,
    update_stage,
    write_record,
)
from cocoa_embed.train.loop.snapshots import KeepSteps, kept_folder
from cocoa_embed.train.loop.stopping import StopOnSigterm, Stopped
from cocoa_embed.train.plan.checks import CHECKPOINTS, Prepared, prepare
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import BridgeSection, ContrastiveSection
from cocoa_embed.train.stages.build import BuiltStage, build_stage
from cocoa_embed.train.stages.contrastive import facts
from cocoa_embed.train.stages.probe import hold_out_rows
from cocoa_embed.train.stages.samples import stage_samples

Inspect = Callable[[str, Trainer], None]


def run(recipe: Recipe, out: Path, *, resume: bool = False, inspect: Inspect | None = None) -> list[StageResult]:
    """Run the stages of ``recipe`` in order; each writes a checkpoint to ``out/<stage>``.

    Every process that a launcher has started calls this; the first reads, writes and speaks for all. Without ``resume``
    what an earlier run left in ``out`` is removed, once data, settings and backbone have proved usable.

    :param resume: Go on where the run in ``out`` was ended, whenever that was; a run that has not begun is begun.
    :param inspect: Called with the stage's name and its trainer when it has ended, before what the stage throws away
        (the pixel decoder) is gone.
    :returns: The stages' results; the last one's folder is what ``export_model`` takes.
    :raises UsageError: If the recipe has no stage, a stage has no data, this machine cannot do what it asks for, or the
        run to be resumed had another recipe or other rows.
    :raises Stopped: If SIGTERM has ended the run; it can be resumed.
    :raises CocoaError: If data, backbone or output folder cannot be used, or a loss is not finite.
    """
    refuse_idle_accelerators()
    prepared = by_first_process(partial(prepare, recipe, out, resume=resume))
    results = list(prepared.results)
    for stage in recipe.stages[len(results) :]:
        with explained_shortage(stage, recipe.section(stage)):
            results.append(_run_stage(recipe, stage, prepared, results, out, inspect))
        gc.collect()  # trainers and their callbacks hold each other, and the model with them
        clear_device_cache()
    if PartialState().is_main_process:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return results


def _run_stage(
    recipe: Recipe, stage: str, prepared: Prepared, before: list[StageResult], out: Path, inspect: Inspect | None
) -> StageResult:
    checkpoints = out / CHECKPOINTS / stage
    checkpoint = newest_complete(checkpoints)
    spent = 0.0 if checkpoint is None else float(read_complete(checkpoint)["seconds"])
    set_seed(recipe.seed)
    built = build_stage(recipe, stage, prepared, start=before[-1].folder if before else None, checkpoints=checkpoints)
    trainer = built.trainer
    trainer.resume_clock(spent)
    save = partial(_save, recipe, stage, prepared, before, built)
    rows, section = prepared.rows[stage].rows, recipe.section(stage)
    held_out = hold_out_rows(rows, section.probe_rows)[0] if isinstance(section, BridgeSection) else []
    if trainer.is_world_process_zero():
        record_begin(out, stage, trainer, rows, held_out)
    trainer.add_callback(RecordProgress(out, stage, trainer))
    kept = section.keep_steps
    trainer.add_callback(KeepSteps(kept, lambda step: save(kept_folder(out / stage, step))))
    stop = StopOnSigterm(trainer)
    trainer.add_callback(stop)
    show_live_losses(trainer, stage)
    if TENSORBOARD in recipe.report_to:
        write_tensorboard(trainer, out / TENSORBOARD / stage)
    if checkpoint is not None and step_of(checkpoint) >= prepared.steps[stage] and not trainer.is_fsdp_enabled:
        trainer.load_finished(checkpoint)  # killed after its last step, before its weights were written
    else:
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(
            f"Stopped by SIGTERM at step {trainer.state.global_step} of {trainer.state.max_steps} of stage {stage}; "
            "the same command with --resume goes on from there."
        )
    if trainer.state.global_step < prepared.steps[stage]:
        raise CocoaError(
            f"Stage {stage} ended at step {trainer.state.global_step} of {prepared.steps[stage]}, as no more batches "
            "could be drawn; lower its batch_size, or give it more different rows."
        )
    if inspect is not None:
        inspect(stage, trainer)
    result = save(out / stage)
    samples = stage_samples(trainer, section, rows, held_out)
    if trainer.is_world_process_zero():
        update_stage(
            out,
            stage,
            finished=True,
            step=result.steps,
            seconds=result.seconds,
            log=result.log,
            facts=result.facts,
            samples=samples,
        )
        shutil.rmtree(checkpoints, ignore_errors=True)
        end_reports(recipe.report_to)
    trainer.accelerator.wait_for_everyone()
    if stage != recipe.stages[-1] and stop.any_requested():
        raise Stopped(f"Stopped by SIGTERM at the end of stage {stage}; the same command with --resume goes on.")
    return result


def _save(
    recipe: Recipe,
    stage: str,
    prepared: Prepared,
    before: list[StageResult],
    built: BuiltStage,
    folder: Path,
) -> StageResult:
    """Write a stage's weights as they are, and last the record of how they were trained."""
    trainer, rows = built.trainer, len(prepared.rows[stage].rows)
    with trainer.throughput.paused():
        if trainer.is_world_process_zero():
            (folder / TRAINING_FILE).unlink(missing_ok=True)  # of an earlier try: it would vouch for half a file
        built.save(folder)
        state, section = trainer.state, recipe.section(stage)
        stated = facts(section) if isinstance(section, ContrastiveSection) else {}
        result = StageResult(stage, folder, state.global_step, rows, trainer.seconds(), list(state.log_history), stated)
        if trainer.is_world_process_zero():
            write_record(recipe, prepared.start, [*before, result])
    return result
