"""The commands ``embed`` and ``load``. Heavy imports are inside functions, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli.index import source_checks
from cocoa_embed.cli.options import (
    AllowHostOption,
    BatchTokensOption,
    DevicesOption,
    DtypeOption,
    EveryOption,
    ExcludeOption,
    IncludeOption,
    MaxPixelsOption,
    RevisionOption,
    TrustOption,
    WorkersOption,
    model_options,
    read_share,
    source_options,
)
from cocoa_embed.cli.output import (
    JsonOption,
    check_all,
    print_json,
    say,
    say_passed_over,
    silence_libraries,
    working,
)
from cocoa_embed.cli.storage import (
    ApiKeyOption,
    CollectionOption,
    CreateOption,
    EdgeOption,
    EmbedOption,
    GrpcOption,
    ModelOption,
    PathOption,
    UrlOption,
    check_storage,
    open_collection,
)
from cocoa_embed.errors import CocoaError, printable, require

if TYPE_CHECKING:
    from rich.console import Console

    from cocoa_embed.integrations.qdrant.shards.embed import EmbedSummary


def embed(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="What `cocoa-embed index` takes.")],
    model: ModelOption,
    out: Annotated[str, typer.Option(help="A folder for embeddings, or its address (s3://bucket/embeddings).")],
    shard: Annotated[str, typer.Option(help="i/n, on the i-th of n machines: embed its parts only.")] = "1/1",
    dimension: Annotated[int | None, typer.Option(min=1, help="Truncate embeddings to this many dimensions.")] = None,
    embed: EmbedOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Embed parts again of which some images could not be used.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Embed on Ray: on this machine, or with =ADDRESS on a cluster."),
    ] = None,
    devices: DevicesOption = None,
    workers: WorkersOption = None,
    batch_tokens: BatchTokensOption = None,
    dtype: DtypeOption = None,
    max_pixels: MaxPixelsOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    allow_host: AllowHostOption = None,
    exclude: ExcludeOption = None,
    every: EveryOption = 10.0,
    include: IncludeOption = "",
    as_json: JsonOption = False,
) -> None:
    """Embed images into Parquet files, for `cocoa-embed load`. What is there already is not embedded again."""
    from cocoa_embed.model.loading import check_model

    options = model_options(devices, workers=workers, batch_tokens=batch_tokens, dtype=dtype)
    options |= {
        "max_pixels": max_pixels,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "dimension": dimension,
    }
    wanted = source_options(allow_host, every, include, exclude)
    (number, count), *_ = check_all(
        partial(read_share, shard), *source_checks(sources, wanted), lambda: check_model(model), partial(check_out, out)
    )
    require("pyarrow", "tables")
    with working() as console:
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
            done = shards.embed(planned, folder, open_encoder(model, **options))
        else:
            from cocoa_embed.integrations.ray import embed_on_ray

            done = embed_on_ray(planned, folder, model, options, address=None if ray == "local" else ray)
        summary = shards.total(tell(done, console), out, lambda: time.perf_counter() - started, faults)
        passed_over.warn_of_unused()
        say_summary(summary, console)
        say_passed_over(passed_over.counts, console)
    if as_json:
        print_json({**dataclasses.asdict(summary), "passed_over": dict(passed_over.counts)})
    if summary.failed:
        raise typer.Exit(1)


def check_out(out: str) -> None:
    """Check that embeddings are not to be written to a file.

    :raises CocoaError: If they are.
    """
    if Path(out).is_file():
        raise CocoaError(f"{printable(out)} is a file; give the name of a folder to write to")


def tell(done: Iterable[EmbedSummary], console: Console) -> Iterator[EmbedSummary]:
    """Pass on what became of each part; print a line for each that was embedded."""
    for number, part in enumerate(done, 1):
        if part.embedded or part.failed:
            rate = f"{part.embedded / part.seconds:.1f} images/s" if part.seconds else "embedded before"
            say(console, f"part {number}: {part.embedded} images, {len(part.failed)} left out ({rate})")
        yield part


def say_summary(summary: EmbedSummary, console: Console) -> None:
    """Print the counts of all parts, and the images that could not be used."""
    counts = f"{summary.embedded} images embedded, {len(summary.failed)} left out"
    files = f"files: {summary.parts} written, {summary.skipped} there before"
    say(console, f"{summary.out}: {counts}; {files} ({summary.seconds:.1f} s)")
    for failure in summary.failed:
        say(console, f"left out: {printable(failure['path'])}: {failure['reason']}")


def load(
    embeddings: Annotated[str, typer.Argument(metavar="DIR", help="A folder or address that `embed` wrote.")],
    shard: Annotated[str, typer.Option(help="i/n, in the i-th of n processes: load its files only.")] = "1/1",
    collection: CollectionOption = "images",
    path: PathOption = None,
    url: UrlOption = None,
    edge: EdgeOption = None,
    api_key: ApiKeyOption = None,
    create: CreateOption = None,
    prefer_grpc: GrpcOption = False,
    as_json: JsonOption = False,
) -> None:
    """Load embeddings into Qdrant, without a model. Loading them again changes nothing."""
    from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder

    storage = {"path": path, "url": url, "edge": edge}
    folder = EmbeddingFolder(embeddings)
    kept: dict[str, Any] = {"create": create, "prefer_grpc": prefer_grpc}
    (number, count), *_ = check_all(
        partial(read_share, shard),
        lambda: check_storage(collection, storage),
        *([lambda: open_collection(collection, storage, None, **kept)] if any(kept.values()) else []),
        *([] if any(kept.values()) else [folder.require_signature]),
    )
    store = open_collection(collection, storage, api_key, **kept)
    with working() as console:
        from tqdm.auto import tqdm

        from cocoa_embed.integrations.qdrant.shards.load import load as load_folder

        with (
            closing(store),
            tqdm(desc=f"loading into {collection}", unit="file", disable=not console.is_terminal) as bar,
        ):
            summary = load_folder(folder, store, bar.update, number=number, count=count)
        say(console, f"{collection}: {summary.points} points loaded ({summary.seconds:.1f} s)")
    if as_json:
        print_json(dataclasses.asdict(summary))
