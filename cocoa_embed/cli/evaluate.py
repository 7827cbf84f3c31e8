"""The commands below ``cocoa-embed eval``. What they need is imported when they run, so that ``--help`` is quick."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli.output import DeviceOption, JsonOption, print_json, say, silence_libraries, working
from cocoa_embed.errors import CocoaError, UsageError, require

if TYPE_CHECKING:
    from rich.console import Console

    from cocoa_embed.encode.encoder import Encoder
    from cocoa_embed.evaluation.mmeb_reader import MmebFolder
    from cocoa_embed.evaluation.pairs_reader import PairColumns
    from cocoa_embed.report.tables import Table

DEFAULT_OUT = Path("cocoa-eval")
FINISHED_FOLDER = "finished"
SHOWN_DIGITS = 8
"""Hexadecimal digits of a fingerprint in the name of a folder."""

TOLD = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")
"""The metrics of pairs that people are told; the others are in the JSON document and the tables."""

evaluation = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class MissingImages(str, Enum):
    """What becomes of rows with an image that is not there."""

    error = "error"
    skip = "skip"


class RepeatedTargets(str, Enum):
    """What becomes of rows that list a target twice."""

    error = "error"
    merge = "merge"


BatchTokensOption = Annotated[
    int | None,
    typer.Option("--batch-tokens", min=1, help="About the most tokens to embed at once [default: 16384]."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help=f"The folder for results [default: one in {DEFAULT_OUT} for the model].")
]


@evaluation.command()
def mmeb(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder like TIGER-Lab/MMEB-eval: SUBSET/*.parquet.")],
    images: Annotated[Path, typer.Option("--images", help="The folder that the paths of images start from.")],
    model: Annotated[
        str, typer.Option("--model", help="A SentenceTransformer folder, or owner/name on the Hugging Face hub.")
    ],
    subset: Annotated[
        list[str] | None, typer.Option("--subset", help="A subset, as MSCOCO_i2t; may be repeated [default: all].")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Score the first rows only; marks the scores as partial.")
    ] = None,
    missing_images: Annotated[
        MissingImages, typer.Option("--missing-images", help="Rows whose images are missing: stop, or leave them out.")
    ] = MissingImages.error,
    repeated_targets: Annotated[
        RepeatedTargets, typer.Option("--repeated-targets", help="A target listed twice: stop, or count it once.")
    ] = RepeatedTargets.error,
    batch_tokens: BatchTokensOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on MMEB-V1. A subset that is finished is not done again."""
    with working() as console:
        from cocoa_embed.evaluation.mmeb_reader import MmebFolder

        folder = MmebFolder(
            data,
            images,
            limit,
            skip_missing_images=missing_images is MissingImages.skip,
            merge_repeated_targets=repeated_targets is RepeatedTargets.merge,
        )
        document = run_mmeb(folder, subset or [], model, device, out, batch_tokens, console)
    if as_json:
        print_json(document)


def run_mmeb(
    folder: MmebFolder,
    asked: Sequence[str],
    model: str,
    device: str | None,
    out: Path | None,
    batch_tokens: int | None,
    console: Console,
) -> dict[str, Any]:
    """Check the data, load the model, score it, and write ``mmeb.json``, ``mmeb.md`` and ``mmeb.html`` as it goes.

    :raises CocoaError: If something is wrong with data or model, or the run is interrupted.
    """
    for module in ("pyarrow.parquet", "jinja2"):
        require(module, "eval")
    from cocoa_embed.evaluation.embed import BATCH_TOKENS
    from cocoa_embed.evaluation.mmeb import check_subsets, evaluate_mmeb
    from cocoa_embed.evaluation.mmeb_tables import mmeb_tables
    from cocoa_embed.evaluation.result_cache import FinishedParts

    checked = check_subsets(folder, asked)
    encoder = load_encoder(model, device)
    fingerprint = encoder.fingerprint
    results = out or DEFAULT_OUT / f"{plain_name(model)}-{fingerprint[:SHOWN_DIGITS]}"
    done: list[str] = []

    def publish(document: dict[str, Any]) -> None:
        done[:] = document["subsets"]
        write_results(results / "mmeb", f"MMEB-V1: {model}", document, mmeb_tables(document))

    try:
        document = evaluate_mmeb(
            encoder,
            fingerprint,
            folder,
            checked,
            FinishedParts(results / FINISHED_FOLDER),
            batch_tokens=batch_tokens or BATCH_TOKENS,
            tell=lambda line: say(console, line),
            publish=publish,
            progress=console.is_terminal,
        )
    except KeyboardInterrupt:
        raise CocoaError(
            f"interrupted; {len(done)} of {len(checked)} subsets are finished in {results}; the same command goes on"
            " from there"
        ) from None
    say(console, averages_line(document))
    say(console, f"wrote {results / 'mmeb'}.json, .md and .html")
    return document


def averages_line(document: Mapping[str, Any]) -> str:
    """Return the averages of those subsets that were run, incomplete ones marked."""
    averages, coverage = document["averages"], document["coverage"]
    told = []
    for name, mean in averages.items():
        covered = coverage[name]
        if mean is not None:
            told.append(f"{name} {mean:.3f}" + f" ({covered['run']}/{covered['of']})" * (not covered["complete"]))
    return f"precision@1: {', '.join(told)}"


@evaluation.command()
def pairs(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder with metadata.jsonl, or a .jsonl, .csv or .parquet file.")
    ],
    model: Annotated[
        list[str], typer.Option("--model", help="A SentenceTransformer; name a second one to compare it with.")
    ],
    images: Annotated[
        Path | None, typer.Option("--images", help="Where a table's paths start [default: the table's folder].")
    ] = None,
    query_text: Annotated[str | None, typer.Option("--query-text", help="The column of the queries' texts.")] = None,
    query_image: Annotated[str | None, typer.Option("--query-image", help="The column of their images.")] = None,
    positive_text: Annotated[
        str | None, typer.Option("--positive-text", help="The column of the right documents' texts.")
    ] = None,
    positive_image: Annotated[str | None, typer.Option("--positive-image", help="The column of their images.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The seed of the bootstrap and the tests.")] = 0,
    batch_tokens: BatchTokensOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A folder for pairs.json, pairs.md and pairs.html [default: none].")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on pairs, in both directions, or compare two models on the same queries."""
    if len(model) > 2:
        raise UsageError(f"--model was given {len(model)} times; give one, or two to compare")
    with working() as console:
        from cocoa_embed.evaluation.pairs_reader import PairColumns

        asked = PairColumns(query_text, query_image, positive_text, positive_image)
        document = run_pairs(data, images, asked, model, device, seed, out, batch_tokens, console)
    if as_json:
        print_json(document)


def run_pairs(
    data: Path,
    images: Path | None,
    columns: PairColumns,
    models: Sequence[str],
    device: str | None,
    seed: int,
    out: Path | None,
    batch_tokens: int | None,
    console: Console,
) -> dict[str, Any]:
    """Read the pairs, score one model after the other, and tell and write what came out, of one too if two were asked.

    :return: As ``evaluate_pairs``, and ``data``: the ``path`` of the pairs, the
        ``images`` folder and the ``columns`` that were asked for.
    :raises CocoaError: If something is wrong with data or models, or the results cannot be written.
    """
    from cocoa_embed.evaluation.embed import BATCH_TOKENS
    from cocoa_embed.evaluation.pairs import evaluate_pairs
    from cocoa_embed.evaluation.pairs_reader import read_pairs
    from cocoa_embed.evaluation.pairs_tables import pairs_tables
    from cocoa_embed.evaluation.result_cache import make_folder
    from cocoa_embed.model.loading import check_model

    found = read_pairs(data, images, columns if columns.names else None)
    for name in models:
        check_model(name)
    if out is not None:
        make_folder(out)
    done: dict[str, Any] = {}
    written: list[Path] = []

    def publish(document: dict[str, Any]) -> None:
        done.update(document)
        done["data"] = {
            "path": str(data.absolute()),
            "images": None if images is None else str(images.absolute()),
            "columns": asdict(columns),
        }
        if out is not None:
            scored = models if "other" in done else models[:1]
            written.clear()
            write_results(out / "pairs", f"Pairs of {data.name}: {' and '.join(scored)}", done, pairs_tables(done))
            written.append(out / "pairs")

    try:
        evaluate_pairs(
            (load_encoder(name, device) for name in models),
            found,
            seed=seed,
            batch_tokens=batch_tokens or BATCH_TOKENS,
            progress=console.is_terminal,
            publish=publish,
        )
    finally:
        if done:
            for line in pairs_lines(done):
                say(console, line)
            for stem in written:
                say(console, f"wrote {stem}.json, .md and .html")
    return done


def pairs_lines(document: Mapping[str, Any]) -> list[str]:
    """Return what people are told of pairs: each model's metrics with intervals, and the differences."""
    lines = []
    for direction in document["subsets"]:
        for scored in (document, document["other"]) if "other" in document else (document,):
            ends = scored["intervals"][direction]
            told = (
                f"{name} {scored['subsets'][direction][name]:.3f} ({ends[name][0]:.3f} to {ends[name][1]:.3f})"
                for name in TOLD
            )
            lines.append(f"{direction}, {scored['model']}: {', '.join(told)}")
    for direction, compared in document.get("comparison", {}).items():
        told = (
            f"{name} {found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}, p {found['p']:.4f})"
            for name, found in compared.items()
            if name in TOLD
        )
        lines.append(f"{direction}, {document['model']} less {document['other']['model']}: {', '.join(told)}")
    return lines


def load_encoder(model: str, device: str | None) -> Encoder:
    """Load a model.

    :raises CocoaError: If it cannot be loaded.
    """
    from cocoa_embed.encode.encoder import Encoder
    from cocoa_embed.model.loading import load_model

    silence_libraries()
    return Encoder(load_model(model, device), model)


def write_results(stem: Path, title: str, document: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """Write results beside each other as JSON, Markdown and HTML, each whole or not at all.

    :param stem: The path of the files without their suffixes.
    :raises CocoaError: If the folder cannot be made or a file cannot be written.
    """
    from cocoa_embed.evaluation.result_cache import make_folder, write_result
    from cocoa_embed.report.tables import to_html, to_markdown

    make_folder(stem.parent)
    texts = {
        "json": json.dumps(document, indent=2) + "\n",
        "md": to_markdown(title, tables),
        "html": to_html(title, tables),
    }
    for suffix, text in texts.items():
        write_result(stem.with_name(f"{stem.name}.{suffix}"), text)


def plain_name(model: str) -> str:
    """Return the last part of a model's name or path as a name for a folder."""
    return re.sub(r"[^\w.-]+", "-", Path(model).absolute().name).strip(".-") or "model"
