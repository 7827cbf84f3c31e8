"""``cocoa-embed report`` and ``diagnose``; each imports heavy modules when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli.options import DeviceOption
from cocoa_embed.cli.output import check_all, say, silence_libraries, working
from cocoa_embed.errors import CocoaError, one_line, printable, require
from cocoa_embed.report.words import GEOMETRY

if TYPE_CHECKING:
    from cocoa_embed.report.content import EvalResult
    from cocoa_embed.train.diagnosis import Diagnosis

RESULT_FILES = ("pairs.json", "mmeb.json")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a training run, finished or not.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="A pairs.json or mmeb.json of eval; can be repeated. Those inside RUN are added.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page [default: report.html in RUN].")] = None,
) -> None:
    """Write a page about a training run: recipe, data, curves, reconstructions, scores. It needs no network."""
    with working():
        from cocoa_embed.evaluation.result_cache import make_folder, write_result
        from cocoa_embed.model.training_record import read_run

        record = read_run(run)  # before matplotlib
        for module in ("jinja2", "matplotlib"):
            require(module, "report")
        from cocoa_embed.report.page import render_page

        page = out or run / "report.html"
        inside = sorted(file for name in RESULT_FILES for file in run.rglob(name))
        files = dict.fromkeys(file.resolve() for file in (*(results or ()), *inside))
        found = [read_result(file, run, record) for file in files]
        make_folder(page.parent)
        write_result(page, render_page(record, printable(run.resolve()), found))
        say(f"wrote {printable(page)}")


def read_result(file: Path, run: Path, record: dict[str, Any]) -> EvalResult:
    """Read a JSON file of ``cocoa-embed eval mmeb`` or ``eval pairs``.

    :param record: ``run.json`` of the run.
    :raises CocoaError: If it is another file, or cannot be read.
    """
    from cocoa_embed.evaluation.mmeb_tables import mmeb_tables
    from cocoa_embed.evaluation.pairs_tables import pairs_tables
    from cocoa_embed.report.content import EvalResult

    name = printable(file)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        tables = {"MMEB-V1": mmeb_tables, "pairs": pairs_tables}[document["benchmark"]](document)
        data = document.get("data", {}).get("path")
        is_own = is_of_run(Path(str(document["model"])).expanduser(), run, record)
    except OSError as error:
        raise CocoaError(f"{name} cannot be read ({one_line(error)})") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CocoaError(f"{name} is not a result of cocoa-embed eval; give a pairs.json or mmeb.json") from error
    return EvalResult(document, tables, name, is_own, data and os.path.realpath(data))


def is_of_run(model: Path, run: Path, record: dict[str, Any]) -> bool:
    """Return whether a model's folder is inside a run, or an export of one of its checkpoints."""
    from cocoa_embed.model.training_record import TRAINING_FILE

    try:
        if model.resolve().is_relative_to(run.resolve()):
            return True
        training = json.loads((model / TRAINING_FILE).read_text(encoding="utf-8"))
        return bool(training.get("run") == record["id"])
    except (OSError, ValueError, AttributeError):  # a name on the hub, or a model that this package did not train
        return False


def diagnose(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of the training, or an exported model.")
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="An image folder with texts [default: the rows that the run held out]."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=2, help="The maximum number of rows [default: all held out, or 64 of --data].")
    ] = None,
    device: DeviceOption = None,
) -> dict[str, Any]:
    """Measure how much of an image a checkpoint's <EOS> carries, and the geometry of its embeddings."""
    with working():
        from cocoa_embed.data.image_folder import find_metadata
        from cocoa_embed.model.training_record import read_training

        # Before torch, which takes seconds.
        check_all(partial(read_training, checkpoint), *([partial(find_metadata, data)] if data else []))
        require("accelerate", "train")
        silence_libraries()
        from cocoa_embed.train.diagnosis import diagnose as measure

        diagnosis = measure(checkpoint, data=data, rows=rows, device=device)
        for line in diagnosis_lines(diagnosis):
            say(line)
    return dataclasses.asdict(diagnosis)


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield the measures of a checkpoint as lines of text."""
    yield f"{printable(diagnosis.checkpoint)}: {diagnosis.rows} {diagnosis.source}"
    if diagnosis.seen_by:
        yield f"  trained on the same data: {', '.join(diagnosis.seen_by)}"
    if diagnosis.masked_tokens is None:
        yield "  masked tokens   not measured: the checkpoint has no language-model head that reads <EOS>"
    else:
        matching, shuffled, none = diagnosis.masked_tokens.values()
        yield (
            f"  masked tokens   {matching:.1%} correct with the matching image, {shuffled:.1%} with a shuffled one, "
            f"{none:.1%} with none; matched minus shuffled {100 * (matching - shuffled):+.1f} points"
        )
    for name, value in diagnosis.geometry.items():
        yield f"  {name.replace('_', ' '):<14}  {value:.3f} ({GEOMETRY[name]})"
