"""The commands of ``cocoa-embed eval``; each imports heavy modules when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cocoa_embed.cli.options import DeviceOption, MaxPixelsOption, ModelOption
from cocoa_embed.cli.output import check_all, say, silence_libraries, working
from cocoa_embed.data import CaptionChoice
from cocoa_embed.errors import CocoaError, UsageError, require
from cocoa_embed.evaluation import BATCH_TOKENS

if TYPE_CHECKING:
    from cocoa_embed.report.tables import Table

SHOWN_DIGITS = 8
"""Hexadecimal digits of a fingerprint in the name of a folder."""

BatchTokensOption = Annotated[
    int, typer.Option("--batch-tokens", min=1, help="The approximate maximum number of tokens in a batch.")
]


def mmeb(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder like TIGER-Lab/MMEB-eval: SUBSET/*.parquet.")],
    images: Annotated[Path, typer.Option(help="The folder that image paths are relative to.")],
    model: ModelOption,
    subset: Annotated[list[str] | None, typer.Option(help="A subset, repeatable [default: all].")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score only the first rows of each subset, as partial scores.")
    ] = None,
    repeated_targets: Annotated[
        Literal["error", "merge"], typer.Option(help="What to do if targets are listed twice.")
    ] = "error",
    batch_tokens: BatchTokensOption = BATCH_TOKENS,
    out: Annotated[
        Path | None, typer.Option(help="The folder for results [default: cocoa-eval/MODEL-FINGERPRINT].")
    ] = None,
    device: DeviceOption = None,
    max_pixels: MaxPixelsOption = None,
) -> dict[str, Any]:
    """Score a model on MMEB-V1. Finished subsets are not scored again."""
    with working():
        from cocoa_embed.evaluation.mmeb_reader import MmebFolder
        from cocoa_embed.model.loading import check_model

        folder = MmebFolder(data, images, limit, repeated_targets == "merge")
        subsets, *_ = check_all(
            partial(folder.read_subsets, subset or []), partial(check_model, model), *_checks_of_out(out)
        )
        for module in ("datasets", "jinja2"):
            require(module, "eval")
        silence_libraries()
        from cocoa_embed.encode.load import load_encoder
        from cocoa_embed.evaluation.mmeb import evaluate_mmeb
        from cocoa_embed.evaluation.mmeb_tables import mmeb_tables
        from cocoa_embed.evaluation.result_cache import ResultCache

        encoder = load_encoder(model, device, max_pixels=max_pixels)
        results = out or Path("cocoa-eval") / f"{plain_name(model)}-{encoder.fingerprint[:SHOWN_DIGITS]}"
        cache = ResultCache(results / "finished")
        document: dict[str, Any] = {"subsets": {}}

        def publish(line: str, scored: dict[str, Any]) -> None:
            document.update(scored)
            if document["subsets"]:
                write_results(results / "mmeb", f"MMEB-V1: {model}", document, mmeb_tables(document))
            say(line)

        try:
            options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": sys.stderr.isatty()}
            evaluate_mmeb(encoder, folder, subsets, cache, publish=publish, **options)
        except KeyboardInterrupt:
            finished = f"{len(document['subsets'])} of {len(subsets)} subsets are finished in {results}"
            raise CocoaError(f"interrupted; {finished}; the same command continues from there") from None
        for name, average in document["averages"].items():
            if average is not None:
                covered = document["coverage"][name]
                say(f"{name}: precision@1 {average:.3f} of {covered['run']}/{covered['of']} subsets")
        say(f"wrote {results / 'mmeb'}.json, .md and .html")
    return document


def pairs(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder with metadata.jsonl, or a .jsonl, .csv or .parquet file.")
    ],
    model: Annotated[list[str], typer.Option(help="A SentenceTransformer; give a second one to compare the two.")],
    images: Annotated[
        Path | None, typer.Option(help="The folder that a table's paths are relative to [default: its own].")
    ] = None,
    query_text: Annotated[str | None, typer.Option(help="The column of query texts.")] = None,
    query_image: Annotated[str | None, typer.Option(help="The column of their images.")] = None,
    positive_text: Annotated[str | None, typer.Option(help="The column of the matching documents' texts.")] = None,
    positive_image: Annotated[str | None, typer.Option(help="The column of their images.")] = None,
    captions: Annotated[
        CaptionChoice, typer.Option(help="A folder's queries: each of an image's captions, or its text.")
    ] = "captions",
    seed: Annotated[int, typer.Option(min=0, help="The seed of intervals and tests.")] = 0,
    batch_tokens: BatchTokensOption = BATCH_TOKENS,
    out: Annotated[
        Path | None, typer.Option(help="A folder for pairs.json, pairs.md and pairs.html [default: none].")
    ] = None,
    device: DeviceOption = None,
    max_pixels: MaxPixelsOption = None,
) -> dict[str, Any]:
    """Score a model on pairs in both directions, or compare two models on the same queries."""
    if len(model) > 2:
        raise UsageError(f"--model was given {len(model)} times; give one model, or two to compare")
    with working():
        from cocoa_embed.evaluation.pairs_reader import read_pairs
        from cocoa_embed.model.loading import check_model

        columns = {"query_text": query_text, "query_image": query_image}
        columns |= {"positive_text": positive_text, "positive_image": positive_image}
        source = {"path": str(data.absolute()), "images": images and str(images.absolute()), "columns": columns}
        found, *_ = check_all(
            partial(read_pairs, data, images, {part: name for part, name in columns.items() if name}, captions),
            *(partial(check_model, name) for name in model),
            *_checks_of_out(out),
        )
        silence_libraries()
        from rich.console import Console

        from cocoa_embed.encode.load import load_encoder
        from cocoa_embed.evaluation.pairs import evaluate_pairs
        from cocoa_embed.evaluation.pairs_tables import pairs_tables, shown_metrics
        from cocoa_embed.report.tables import to_terminal

        document: dict[str, Any] = {}

        def publish(scored: dict[str, Any]) -> None:
            document.update(scored, data=source, max_pixels=max_pixels)
            if out is not None:
                title = f"Pairs of {data.name}: {' and '.join(model[: 2 if 'other' in scored else 1])}"
                write_results(out / "pairs", title, document, pairs_tables(document))

        try:
            encoders = (load_encoder(name, device, max_pixels=max_pixels) for name in model)
            evaluate_pairs(
                encoders, found, seed=seed, batch_tokens=batch_tokens, progress=sys.stderr.isatty(), publish=publish
            )
        finally:  # if the second model fails, the first model's scores are still shown
            for table in pairs_tables(document, shown_metrics(document)) if document else ():
                Console(stderr=True).print(to_terminal(table))
            if document and out is not None:
                say(f"wrote {out / 'pairs'}.json, .md and .html")
    return document


def _checks_of_out(out: Path | None) -> list[partial[Any]]:
    from cocoa_embed.evaluation.result_cache import make_folder

    return [] if out is None else [partial(require, "jinja2", "eval"), partial(make_folder, out)]


def write_results(stem: Path, title: str, document: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """Write results as JSON, Markdown and HTML.

    :param stem: The path of the files without their suffixes.
    :raises CocoaError: If a file cannot be written.
    """
    from cocoa_embed.evaluation.result_cache import write_result
    from cocoa_embed.report.tables import to_html, to_markdown

    write_result(stem.with_suffix(".json"), json.dumps(document, indent=2) + "\n")
    write_result(stem.with_suffix(".md"), to_markdown(title, tables))
    write_result(stem.with_suffix(".html"), to_html(title, tables))


def plain_name(model: str) -> str:
    """Return the last part of a model's name or path as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", Path(model).absolute().name).strip(".-") or "model"
