"""The commands ``embed`` and ``load``. Heavy imports are inside functions, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli import options
from cocoa_embed.cli.index import source_checks
from cocoa_embed.cli.output import check_all, say, say_left_out, say_passed_over, silence_libraries, working
from cocoa_embed.cli.storage import DEFAULT_BACKEND, Backend, CollectionOption, Storage, open_collection, storage_checks
from cocoa_embed.errors import CocoaError, UsageError, printable, require

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.shards.embed import EmbedSummary


def embed(
    *,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="What `cocoa-embed index` takes.")],
    model: options.ModelOption,
    out: Annotated[str, typer.Option(help="A folder for embeddings, or its address (s3://bucket/embeddings).")],
    shard: Annotated[str, typer.Option(help="i/n on the i-th of n machines: embed only its parts.")] = "1/1",
    dimension: options.DimensionOption = None,
    embed: options.EmbedOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Embed parts again if some of their images could not be used.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(help="Embed on Ray: on this machine, or with =ADDRESS on a cluster.")
    ] = None,
    devices: options.Devices,
    loading: options.Loading,
    given: options.Sources,
) -> dict[str, Any]:
    """Embed images into Parquet files, for `cocoa-embed load`. What is already there is not embedded again."""
    from cocoa_embed.model.loading import check_model

    settings = {**devices.arguments(), **vars(loading), "dimension": dimension}
    wanted = given.options()
    (number, count), *_ = check_all(
        partial(read_shard, shard), *source_checks(sources, wanted), lambda: check_model(model), partial(check_out, out)
    )
    require("pyarrow", "tables")
    with working():
        silence_libraries()
        from cocoa_embed.encode.devices import open_encoder
        from cocoa_embed.images.passed_over import PassedOver
        from cocoa_embed.integrations.qdrant.shards import embed as shards
        from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder
        from cocoa_embed.sources.open import all_sources

        started = time.perf_counter()
        faults: list[dict[str, str]] = []
        passed_over = PassedOver(wanted.exclude)
        note = lambda path, reason: faults.append({"path": str(path), "reason": reason})  # noqa: E731
        found = all_sources(sources, wanted, note, passed_over)
        folder = EmbeddingFolder(out, embed or "image")
        planned = shards.plan(found, folder, number=number, count=count, retry_failed=retry_failed)
        if ray is None:
            done = shards.embed(planned, folder, open_encoder(model, **settings))
        else:
            from cocoa_embed.integrations.ray import embed_on_ray

            done = embed_on_ray(planned, folder, model, settings, address=None if ray == "local" else ray)
        summary = shards.total(report_parts(done), out, lambda: time.perf_counter() - started, faults)
        passed_over.warn_of_unused()
        say_summary(summary)
        say_passed_over(passed_over.counts)
    return {**dataclasses.asdict(summary), "passed_over": dict(passed_over.counts)}


def read_shard(text: str) -> tuple[int, int]:
    """Return the two numbers of ``--shard i/n``.

    :raises UsageError: If it has another form, or ``i`` is not between 1 and ``n``.
    """
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(
            f"--shard {text} is not of the form i/n, with i from 1 to n; give 1/4 on the first of four machines"
        )
    return int(first), int(last)


def check_out(out: str) -> None:
    """Check that the output is not a file.

    :raises CocoaError: If it is.
    """
    if os.path.isfile(out):  # False for a name that is too long; writing reports that
        raise CocoaError(f"{printable(out)} is a file; give the name of a folder to write to")


def report_parts(done: Iterable[EmbedSummary]) -> Iterator[EmbedSummary]:
    """Yield the summary of each part, and print a line for each part that was embedded."""
    for number, part in enumerate(done, 1):
        if part.embedded or part.failed:
            rate = f"{part.embedded / part.seconds:.1f} images/s" if part.seconds else "already embedded"
            say(f"part {number}: {part.embedded} images, {len(part.failed)} left out ({rate})")
        yield part


def say_summary(summary: EmbedSummary) -> None:
    """Print the counts of all parts, and the images that could not be used."""
    counts = f"{summary.embedded} images embedded, {len(summary.failed)} left out"
    files = f"files: {summary.parts} written, {summary.skipped} already there"
    say(f"{summary.out}: {counts}; {files} ({summary.seconds:.1f} s)")
    say_left_out(summary.failed)


def load(
    *,
    embeddings: Annotated[str, typer.Argument(metavar="DIR", help="A folder or address that `embed` wrote.")],
    shard: Annotated[str, typer.Option(help="i/n in the i-th of n processes: load only its files.")] = "1/1",
    collection: CollectionOption = "images",
    storage: Storage,
    backend: Backend,
) -> dict[str, Any]:
    """Load embeddings into Qdrant, without a model. Loading them again changes nothing."""
    from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder

    folder = EmbeddingFolder(embeddings)
    (number, count), *_ = check_all(
        partial(read_shard, shard),
        *storage_checks(collection, storage, backend),
        *([folder.require_signature] if backend == DEFAULT_BACKEND else []),
    )
    store = open_collection(collection, storage, backend)
    with working():
        from tqdm.auto import tqdm

        from cocoa_embed.integrations.qdrant.shards.load import load as load_folder

        with (
            closing(store),
            tqdm(desc=f"loading into {collection}", unit="file", disable=not sys.stderr.isatty()) as bar,
        ):
            summary = load_folder(folder, store, bar.update, number=number, count=count)
        say(f"{collection}: {summary.points} points loaded ({summary.seconds:.1f} s)")
    return dataclasses.asdict(summary)
