"""``cocoa-embed caption``, ``train``, ``export``; heavy imports wait until one runs: ``--help`` is quick."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cocoa_embed.cli.options import DeviceOption
from cocoa_embed.cli.output import check_all, say, say_left_out, silence_libraries, working
from cocoa_embed.errors import CocoaError, UsageError, did_you_mean, printable, require
from cocoa_embed.folders import RUN_MARKER, refuse_checkpoint, refuse_foreign_folder
from cocoa_embed.model.loading import collector_paused
from cocoa_embed.report.words import duration

if TYPE_CHECKING:
    from cocoa_embed.captioning.prompts import Writer
    from cocoa_embed.captioning.run import CaptionRun
    from cocoa_embed.train import Recipe, StageResult
    from cocoa_embed.train.plan.dry_run import RunPlan, StagePlan, SubsetPlan


def caption(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of images.")],
    out: Annotated[Path, typer.Option(help="The image folder to write: texts, and the paths of the images.")],
    backbone: Annotated[
        str | None,
        typer.Option(
            "--with", metavar="BACKBONE", help="Write with this vision-language model, before it is trained here."
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask an OpenAI-compatible endpoint, such as http://host:8000/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's model.")] = None,
    key_variable: Annotated[
        str | None,
        typer.Option(help="The environment variable that holds the endpoint's key [default: OPENAI_API_KEY]."),
    ] = None,
    wordings: Annotated[int, typer.Option(min=1, help="Captions to ask for per image.")] = 3,
    questions: Annotated[
        int | None, typer.Option(min=0, help="Question-answer pairs to ask for per image [default: 3].")
    ] = None,
    replace_below: Annotated[
        int, typer.Option(min=0, metavar="WORDS", help="Replace texts of fewer words than this, such as class names.")
    ] = 4,
    max_pixels: Annotated[int, typer.Option(min=784, help="Scale larger images down to this.")] = 1280 * 28 * 28,
    at_once: Annotated[int, typer.Option(min=1, help="Images in a batch, or requests to the endpoint.")] = 8,
    device: DeviceOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Begin without asking.")] = False,
    dry_run: Annotated[
        Literal["sample"] | None,
        typer.Option(help="Print what it would do and cost, estimated from a sample, and stop."),
    ] = None,
) -> dict[str, Any]:
    """Write captions and question-answer pairs for images without text. A second run continues where one stopped."""
    if (backbone is None) == (endpoint is None):
        raise UsageError("Give either --with BACKBONE or --endpoint URL --model NAME: one of them writes the texts.")
    if (endpoint is None) != (model is None):
        raise UsageError("--endpoint and --model belong together: the address, and the name of a model there.")
    with working():
        from cocoa_embed.captioning.prompts import Prompts
        from cocoa_embed.captioning.run import CaptionRun, check_folders

        check_folders(folder, out)  # before torch, which takes seconds
        silence_libraries()
        prompts = Prompts.load()
        writer: Writer
        if endpoint is not None and model is not None:
            from cocoa_embed.captioning.endpoint import EndpointWriter

            writer = EndpointWriter(endpoint, model, prompts, max_pixels, at_once, key_variable)
        else:
            from cocoa_embed.captioning.backbone import BackboneWriter

            writer = BackboneWriter(str(backbone), prompts, max_pixels, at_once, device)
        if questions and not writer.follows_prompts:
            raise UsageError(f"{backbone} follows no prompts (its chat template opens no turn for an answer), so it "
                             "answers no questions; leave out --questions.")  # fmt: skip
        count = (3 if questions is None else questions) * writer.follows_prompts
        job = CaptionRun(folder, out, writer, prompts, wordings, count, replace_below)
        document = job.plan()
        say(CAPTION_PLAN.format(**document))
        if dry_run is None:
            if document["to_caption"] and not yes:
                if not (sys.stderr.isatty() and sys.stdin.isatty()):
                    raise UsageError(
                        "Nothing was asked or written yet; give --yes to begin, or --dry-run to stop here."
                    )
                typer.confirm("Begin?", abort=True, err=True)
            document = _caption(job, document["to_caption"])
    return document


CAPTION_PLAN = """\
{writer}: {images:,} images, of which {kept:,} keep their text and {done:,} are captioned already
{to_caption:,} to caption: {requests:,} requests, about {tokens_in:,} tokens in, at most {tokens_out_at_most:,} out"""


CAPTION_SUMMARY = (
    "{out}: {captioned:,} images captioned ({captions:,} captions, {questions:,} questions), {kept:,} kept"
)


def _caption(job: CaptionRun, total: int) -> dict[str, Any]:
    """Caption with a progress bar, and print a summary of the images."""
    from tqdm.auto import tqdm

    bar = tqdm(desc="captioning", total=total, unit="image", disable=not sys.stderr.isatty())
    with bar, contextlib.closing(job.caption()) as batches:
        for images in batches:
            bar.update(images)
    say(CAPTION_SUMMARY.format(**job.summary))
    for key, words in (("failed", "left out"), ("unusable", "answer left out")):
        say_left_out(job.summary[key], words)
    return job.summary


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Values to change in the recipe.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder for checkpoints [default: runs/ and the recipe's name].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out, if any.")] = False,
    dry_run: Annotated[
        Literal["sample", "full", "timed"] | None,
        typer.Option(
            help="Print what the run would do and cost, and stop. Alone it checks a sample of the images; =full checks "
            "all; =timed loads the weights, too, and times a few steps of each stage."
        ),
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="With --dry-run, estimate the hours on a card such as a100, h100 or l40s.")
    ] = None,
) -> dict[str, Any] | None:
    """Train a model by a recipe: warm-up, bridge, contrastive. Each stage writes a checkpoint."""
    is_first = os.environ.get("RANK", "0") == "0"
    with working():
        require("yaml", "train")
        from cocoa_embed.train.plan.cards import CARDS

        if card is not None and card not in CARDS:
            raise UsageError(f"--card {card!r} is unknown {did_you_mean(card, list(CARDS))}.")
        if card is not None and dry_run is None:
            raise UsageError("--card estimates hours without a run; give --dry-run, too.")
        loaded = _load(recipe, overrides or [], out) if is_first else None  # before torch, which takes seconds
        require("accelerate", "train")
        silence_libraries()
        with collector_paused():
            from cocoa_embed.train import run
            from cocoa_embed.train.loop.processes import by_first_process, silence_nonzero_ranks
            from cocoa_embed.train.plan.dry_run import plan
            from cocoa_embed.train.timing import seconds_per_step

        silence_nonzero_ranks()
        chosen = by_first_process(lambda: loaded or _load(recipe, overrides or [], out))
        folder = out or Path("runs") / chosen.name
        if dry_run is not None:
            check: Any = "all" if dry_run == "full" else "sample"
            timer = seconds_per_step if dry_run == "timed" else None
            planned = plan(chosen, folder, resume=resume, check=check, card=card, seconds_per_step=timer)
            document, lines = dataclasses.asdict(planned), plan_lines(planned)
        else:
            results = run(chosen, folder, resume=resume)
            document, lines = {"stages": list(map(stage_document, results))}, stage_lines(results)
        if is_first:
            for line in lines:
                say(line)
    return document if is_first else None


def _load(recipe: str, overrides: list[str], out: Path | None) -> Recipe:
    """Read a recipe, and check its local files and folders."""
    from cocoa_embed.train import Recipe

    loaded = Recipe.load(recipe, overrides, check_paths=True)
    folder = out or Path("runs") / loaded.name
    check_all(partial(refuse_foreign_folder, folder, marker=RUN_MARKER), partial(check_columns, loaded))
    return loaded


QUICK_BYTES = 16 * 2**20
"""Files up to this size are read in a moment."""


def check_columns(recipe: Recipe) -> None:
    """Check that local tables and the image folders of a recipe have the columns that training reads.

    Files larger than ``QUICK_BYTES`` are left to training, so that they are read only once.

    :raises CocoaError: If one lacks them, or cannot be read.
    """
    from cocoa_embed.data.columns import map_columns
    from cocoa_embed.data.image_folder import TEXT_COLUMNS, find_metadata
    from cocoa_embed.data.tables import find_files, open_table

    columns_of = cache(lambda path: open_table(path).columns)
    stages = [stage for stage in recipe.registry() if getattr(recipe, stage) is not None]
    for source in (source for stage in stages for source in recipe.sources_of(stage).values()):
        if source.folder is not None:
            files = [file for file in [find_metadata(source.folder)] if file.is_file()]
        elif source.file is not None and "://" not in source.file:  # a remote file would be downloaded twice
            files = [Path(str(file)) for file in find_files(source.file)]
        else:
            continue
        if any(file.stat().st_size > QUICK_BYTES for file in files):
            continue
        found = list(dict.fromkeys(column for file in files for column in columns_of(file)))
        if source.folder is None:
            given = source.columns.model_dump(exclude_none=True) if source.columns else None
            map_columns(printable(source.file or ""), found, given)
        elif found and not {*TEXT_COLUMNS, "captions", "questions"} & {*found}:
            raise CocoaError(f"{printable(files[0])} has no column 'text' {did_you_mean('text', found)}")


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of the training.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the model to write.")],
    vectors: Annotated[
        int | None, typer.Option(min=1, help="1 exports only the first vector of a model of several [default: all].")
    ] = None,
) -> None:
    """Write a checkpoint as a SentenceTransformer folder, which loads without this package.

    A model of several vectors becomes a MultiVectorEncoder.
    """
    with working():
        from cocoa_embed.model.training_record import TRAINING_FILE, read_training

        # Before torch, which takes seconds.
        check_all(
            partial(read_training, checkpoint),
            partial(refuse_checkpoint, out),
            partial(refuse_foreign_folder, out, marker=TRAINING_FILE),
        )
        silence_libraries()
        with collector_paused():
            from cocoa_embed.model.export import export_model

        say(f"wrote {export_model(checkpoint, out, vectors)}")


def stage_lines(results: Sequence[StageResult]) -> Iterator[str]:
    """Yield steps, time and loss of each stage as lines of text."""
    for result in results:
        yield f"{result.stage}: {result.steps} steps, {duration(result.seconds)}, loss {result.final['loss']:.3f}"
    yield f"{duration(sum(result.seconds for result in results))} in all; checkpoint {results[-1].folder}"


def stage_document(result: StageResult) -> dict[str, Any]:
    """Return the JSON document of a stage's result."""
    return {
        "stage": result.stage,
        "checkpoint": str(result.folder),
        "steps": result.steps,
        "rows": result.rows,
        "seconds": round(result.seconds, 1),
        "final": result.final,
    }


def plan_lines(planned: RunPlan) -> Iterator[str]:
    """Yield the plan and the cost of a run as lines of text."""
    yield f"{planned.recipe}: {planned.backbone}, {planned.devices} device{'s' * (planned.devices > 1)}"
    yield from (f"{stage}: already finished" for stage in planned.finished)
    for stage in planned.stages:
        yield f"{stage.stage}: writes {stage.folder}"
        for name, text in stage_facts(stage, planned.card):
            yield f"  {name:<11} {text}"
    for place, times in (
        ("here", [stage.seconds for stage in planned.stages]),
        (f"on one {planned.card}", [stage.card_seconds for stage in planned.stages]),
    ):
        if known := [seconds for seconds in times if seconds is not None]:
            yield f"all stages: about {duration(sum(known))} {place}"
    if planned.unchecked_images:
        yield f"images: a sample was checked, and {planned.unchecked_images:,} were not; --dry-run=full checks all"
    yield from (f"would be skipped: {row['source']}: {row['reason']}" for row in planned.bad_rows)
    yield from (f"warning: {warning}" for warning in planned.warnings)


def stage_facts(stage: StagePlan, card: str | None) -> Iterator[tuple[str, str]]:
    """Yield the facts about a planned stage, as pairs of a name and a text."""
    ratio = stage.trainable_parameters / stage.parameters
    yield "parameters", f"{stage.parameters:,}, of which {stage.trainable_parameters:,} are trained ({ratio:.1%})"
    yield from (("rows", f"{name} {subset_words(subset)}") for name, subset in stage.subsets.items())
    if stage.max_rows is not None:
        yield "drawn", f"{stage.max_rows:,} rows of all subsets (max_rows)"
    yield from (
        ("left out", f"{subset.left_out:,} rows of {name}: {stage.needs}")
        for name, subset in stage.subsets.items()
        if subset.left_out
    )
    done = f", of which {stage.steps_done:,} are done" if stage.steps_done else ""
    fewer = f" ({stage.mean_batch_size:,.0f} on average)" if round(stage.mean_batch_size) < stage.batch_size else ""
    at_once = f"{stage.rows_at_once} at once on a device"
    yield "steps", f"{stage.steps:,} of {stage.batch_size:,} rows{fewer}{done}, {at_once}"
    yield "epochs", f"{stage.epochs:,.0f}" if stage.epochs >= 100 else f"{stage.epochs:.3g}"
    for held in stage.step_contents:
        of_step = "{subset}: {rows_a_step:,} of its rows, which have {positives:,} different positives"
        of_step += " and {hard_negatives} hard negatives each" if held["hard_negatives"] else ""
        yield "a step", of_step.format(**held)
    yield "tokens", f"about {stage.tokens_per_step:,.0f} a step"
    if chosen := [f"{size:,} {kind}" for kind, size in stage.sizes_at_once.items()]:
        how = "with" if stage.gradient_checkpointing else "without"
        yield "at once", f"{', '.join(chosen)} fit, {how} gradient checkpointing"
    kept = [f"{name} {binary_size(size)}" for name, size in stage.memory_bytes.items() if size and name != "total"]
    yield "memory", f"about {binary_size(stage.memory_bytes['total'])} a device ({', '.join(kept)})"
    yield "disk", f"up to three checkpoints of {binary_size(stage.checkpoint_bytes)} while it runs"
    yield "compute", f"about {stage.flops:.2g} FLOP in all"
    if stage.seconds is not None and stage.seconds_per_step is not None:
        yield "time", f"about {duration(stage.seconds)} here, at {stage.seconds_per_step:.3g} s a step"
    if stage.card_seconds is not None:
        yield "time", f"about {duration(stage.card_seconds)} on one {card}, counted kernel by kernel"


def subset_words(subset: SubsetPlan) -> str:
    """Return how many rows a subset has, and where they come from."""
    weight, texts = float(subset.source.get("weight", 1)), subset.rows - subset.rows_with_image
    if "folder" in subset.source and subset.images:
        captions, paraphrases, all_rows = (
            f"{count / subset.images / weight:.3g}" for count in (subset.rows_with_image, texts, subset.rows)
        )
        each = f"{captions} captions + {paraphrases} paraphrases = {all_rows}" if texts else all_rows
        how = f"{subset.images:,} images; {each} row{'s' * (all_rows != '1')} an image"
    else:
        counts = {"with an image": subset.rows_with_image, "of text alone": texts}
        how = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    limit = f"; limit {subset.source['limit']:,}" if "limit" in subset.source else ""
    return f"{subset.rows:,} ({how}{limit}{f'; each drawn {weight:g} times' if weight != 1 else ''})"


def binary_size(count: float) -> str:
    """Return a number of bytes as text."""
    unit, size = ("GiB", count / 2**30) if count >= 2**30 else ("MiB", count / 2**20)
    return f"{size:.1f} {unit}"
