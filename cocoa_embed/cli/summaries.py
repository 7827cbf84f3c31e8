"""What the commands tell people on standard error, and the documents that programs read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cocoa_embed.errors import printable
from cocoa_embed.report.series import GEOMETRY

if TYPE_CHECKING:
    from rich.console import Console

    from cocoa_embed.integrations.qdrant.indexer import IndexSummary
    from cocoa_embed.integrations.qdrant.stores.base import Hit
    from cocoa_embed.train import StageResult
    from cocoa_embed.train.diagnosis import ChosenRows, Diagnosis
    from cocoa_embed.train.plan.dry_run import RunPlan


def report_stages(results: Sequence[StageResult], console: Console) -> None:
    """Tell people what a training run did, and how long each stage took."""
    for result in results:
        line = f"{result.stage}: {result.steps} steps, {clock(result.seconds)}, loss {result.final['loss']:.3f}"
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    total = clock(sum(result.seconds for result in results))
    console.print(f"{total} in all; checkpoint {results[-1].folder}", soft_wrap=True, markup=False, highlight=False)


def stage_document(result: StageResult) -> dict[str, Any]:
    """Return a stage's result as programs read it."""
    return {
        "stage": result.stage,
        "checkpoint": str(result.folder),
        "steps": result.steps,
        "rows": result.rows,
        "seconds": round(result.seconds, 1),
        "final": result.final,
    }


def report_plan(planned: RunPlan, console: Console) -> None:
    """Tell people what a run would do and cost."""
    lines = [f"{planned.recipe}: {planned.backbone}, {planned.devices} device{'s' * (planned.devices > 1)}"]
    lines += [f"{stage}: finished already" for stage in planned.finished]
    for stage in planned.stages:
        share = stage.trainable_parameters / stage.parameters
        rows = ", ".join(f"{name} {count}" for name, count in stage.rows.items())
        kept = ", ".join(f"{name} {binary_size(held)}" for name, held in stage.memory_bytes.items() if name != "total")
        lines += [
            f"{stage.stage}: writes {stage.folder}",
            f"  parameters  {stage.parameters:,}, of them trained {stage.trainable_parameters:,} ({share:.1%})",
            f"  rows        {sum(stage.rows.values()):,} ({rows})",
            f"  steps       {stage.steps:,} of {stage.batch_size} rows, {stage.rows_at_once} at once on a device",
            f"  tokens      about {stage.tokens_per_step:,.0f} a step",
            f"  memory      about {binary_size(stage.memory_bytes['total'])} a device ({kept})",
            f"  disk        up to three checkpoints of {binary_size(stage.checkpoint_bytes)} while it runs",
            f"  compute     about {stage.flops:.2g} FLOP in all",
        ]
    lines += [f"would be left out: {row['source']}: {row['reason']}" for row in planned.bad_rows]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def binary_size(count: float) -> str:
    """Return a number of bytes as people read it."""
    unit, size = ("GiB", count / 2**30) if count >= 2**30 else ("MiB", count / 2**20)
    return f"{size:.1f} {unit}"


def clock(seconds: float) -> str:
    """Return a duration as people read it: seconds, or hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def report_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Tell people what was measured of a checkpoint, on which rows, and how to read it."""
    chosen = diagnosis.chosen
    lines = [f"{printable(diagnosis.checkpoint)}: {len(chosen.rows)} {chosen.place}", f"  {trained_on_line(chosen)}"]
    if diagnosis.hidden_tokens is None:
        lines.append("  hidden tokens   not measured: the checkpoint has no language-model head, as after stage 3")
    else:
        right, shuffled, none = (f"{share:.1%}" for share in diagnosis.hidden_tokens.values())
        lines.append(f"  hidden tokens   {right} told with the right image, {shuffled} with another, {none} with none")
    lines += [
        f"  {name.replace('_', ' '):<14}  {figure:.3f} ({GEOMETRY[name].short})"
        for name, figure in diagnosis.geometry.items()
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def trained_on_line(chosen: ChosenRows) -> str:
    """Say which stages were trained on the rows that a checkpoint was measured on."""
    seen = [f"{stage} ({count} of them)" for stage, count in chosen.trained_on.items() if count]
    unknown = [stage for stage, count in chosen.trained_on.items() if count is None]
    told = (
        f"trained on by {', '.join(seen)}" if seen else "trained on by no stage" + " that can be told" * bool(unknown)
    )
    return told + (f"; cannot be told of {', '.join(unknown)}" if unknown else "")


def report_summary(summary: IndexSummary, console: Console) -> None:
    """Tell people what an indexing run did, naming the files left out."""
    figures = dataclasses.asdict(summary)
    counts = ", ".join(f"{figures[name]} {name}" for name in ("indexed", "unchanged", "updated", "replaced", "pruned"))
    rate = f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images/s"
    lines = [f"{summary.collection}: {counts}, {len(summary.failed)} left out ({rate})"]
    lines += [f"left out: {printable(failure['path'])}: {failure['reason']}" for failure in summary.failed]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def report_hits(hits: Sequence[Hit], console: Console) -> None:
    """Tell people what a search found, best first."""
    for hit in hits:
        line = f"{hit.score:.4f}  {printable(hit.path)}" + (f"  {' '.join(hit.caption.split())}" if hit.caption else "")
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if not hits:
        console.print("nothing found")


def hit_document(hit: Hit) -> dict[str, Any]:
    """Return a hit as programs read it, without what is in the payload for LlamaIndex alone."""
    from cocoa_embed.integrations.qdrant.points import plain_payload

    return {**dataclasses.asdict(hit), "payload": plain_payload(hit.payload)}
