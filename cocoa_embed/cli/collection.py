"""The commands about a collection: ``info``, ``list``, ``forget``... None of them loads a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cocoa_embed.cli.output import check_all, printing, say, working
from cocoa_embed.cli.storage import (
    ApiKeyOption,
    CollectionOption,
    FilterOption,
    Storage,
    check_storage,
    open_collection,
)
from cocoa_embed.errors import CocoaError, UsageError, printable

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.stores.store import Store


@contextlib.contextmanager
def reading(collection: str, storage: Storage) -> Iterator[Store]:
    """Open a collection that must exist, and reserve standard output for the result meanwhile."""
    check_storage(collection, storage, exists=True)
    with working(), contextlib.closing(open_collection(collection, storage)) as store:
        yield store


def info(*, collection: CollectionOption = "images", storage: Storage) -> dict[str, Any]:
    """Show a collection: its model, the number of images, and the keys that filters can use."""
    with reading(collection, storage) as store:
        from cocoa_embed.integrations.qdrant.searching.payload_keys import sampled_keys

        found = dataclasses.asdict(store.require_signature())
        indexes = store.payload_indexes()
        document: dict[str, Any] = {"collection": collection, "points": store.count(), **found}
        document |= {"keys": sorted(sampled_keys(store)), "indexed_keys": None if indexes is None else sorted(indexes)}
        fingerprint = f"fingerprint {found['fingerprint']:.12}" if found["fingerprint"] else "made by another program"
        say(f"{store.name}: {document['points']} images")
        say(f"model: {found['model']} ({fingerprint}), {found['dimension']} dimensions")
        several = f", {found['vectors']} vectors each" if found["vectors"] > 1 else ""
        say(f"embeds: {found['embed']}{several}")
        say(f"keys: {', '.join(document['keys']) or 'none'}")
        if indexes is not None:
            say(f"filters work only on: {', '.join(sorted(indexes))}")
    return document


def list_collections(storage: Storage) -> dict[str, Any]:
    """List the collections in an index or on a server."""
    with working():
        with reading("images", storage) as place:  # in a folder, only one can be open at a time
            names, location, aliases = place.collections(), place.location, place.aliases()
        listed = [describe(name, storage) for name in names]
        for each in listed:
            about = each.get("error") or "{points} points, {dimension} dimensions, {model}".format(**each)
            say(f"{each['collection']}: {about}")
        for name, target in aliases.items():
            say(f"{name}: an alias of {target}")
        if not listed:
            say(f"no collections in {location}")
    return {"collections": listed, "aliases": aliases}


def describe(name: str, storage: Storage) -> dict[str, Any]:
    """Return the name, size and model of a collection; for one that cannot be searched, the name and the reason."""
    with contextlib.closing(open_collection(name, storage)) as store:
        try:
            signature = store.require_signature()
        except CocoaError as error:
            return {"collection": name, "error": str(error)}
        return {"collection": name, "points": store.count(), "dimension": signature.dimension, "model": signature.model}


def export_points(
    *,
    out: Annotated[str, typer.Argument(metavar="OUT", help="A .jsonl or .parquet file, or - for standard output.")],
    filters: FilterOption = None,
    vectors: Annotated[bool, typer.Option("--vectors", help="Write the embeddings too.")] = False,
    collection: CollectionOption = "images",
    storage: Storage,
) -> None:
    """Write the points of a collection, id and payload, as JSON lines or as a Parquet file."""
    from cocoa_embed.integrations.qdrant.searching.export import check_out, write_points
    from cocoa_embed.integrations.qdrant.searching.filters import parse_filters

    check_all(lambda: check_out(out), lambda: parse_filters(filters or []))
    with printing() as standard_output, reading(collection, storage) as store:
        from cocoa_embed.integrations.qdrant.stores.client_filters import read_filter

        condition = read_filter(filters, store.payload_indexes())
        count = write_points(out, store.points(condition, with_vectors=vectors), standard_output)
        say(f"{count} points of {store.name} written to {'standard output' if out == '-' else printable(out)}")


def forget(
    *,
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders, archives, addresses.")],
    collection: CollectionOption = "images",
    storage: Storage,
) -> dict[str, Any]:
    """Remove images from an index, whether or not their files exist. Copies elsewhere stay in the index."""
    with reading(collection, storage) as store:
        from cocoa_embed.integrations.qdrant.indexing.manifest import open_manifest
        from cocoa_embed.integrations.qdrant.indexing.prune import forget as forget_paths

        fingerprint = store.require_signature().fingerprint
        with contextlib.closing(open_manifest(store.place, collection, fingerprint)) as manifest:
            forgotten = forget_paths(store, manifest, paths)
        store.finish()
        for name, count in forgotten.images.items():
            say(f"{printable(name)}: {count} images forgotten" if count else f"{printable(name)}: not indexed")
    failed = [{"path": name, "reason": "not indexed"} for name, count in forgotten.images.items() if not count]
    return {"collection": collection, "forgotten": forgotten.images, "deleted": forgotten.deleted, "failed": failed}


Kind = Literal["keyword", "text", "integer", "float", "bool", "datetime"]


def filterable(
    *,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys, written as in filters, such as licence.")],
    kind: Annotated[Kind | None, typer.Option(help="The type of index [default: inferred from the values].")] = None,
    collection: CollectionOption = "images",
    storage: Storage,
) -> None:
    """Create indexes on columns: hosted servers need them for filters, others and Edge filter faster with them."""
    if storage.url is None and storage.edge is None:
        raise UsageError("a local index (--path) filters by any key and has no indexes; --url and --edge have them")
    with reading(collection, storage) as store:
        from cocoa_embed.integrations.qdrant.searching.payload_keys import create_index

        store.require_signature()
        for key in keys:
            field, made = create_index(store, key, kind)
            say(f"{store.name}: {made} index on {field}")


def alias(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The alias, which any command accepts as --collection.")],
    collection: Annotated[
        str, typer.Argument(metavar="COLLECTION", help="The collection that it refers to from now on.")
    ],
    storage: Storage,
) -> None:
    """Make a name an alias of a collection; a later call switches it to another collection in one step."""
    with reading(collection, storage) as store:
        before = store.set_alias(name)
        was = f", previously of {before}" if before not in (None, collection) else ""
        say(f"{printable(name)} is an alias of {printable(collection)} in {store.location}{was}")


def seed(
    url: Annotated[str, typer.Option(help="The server.")],
    edge: Annotated[Path, typer.Option(help="A Qdrant Edge folder, created if needed.")],
    collection: CollectionOption = "images",
    api_key: ApiKeyOption = None,
) -> None:
    """Copy a collection with one shard, search index included, from a server to Qdrant Edge, as a snapshot."""
    from cocoa_embed.integrations.qdrant.stores.edge import EdgeStore
    from cocoa_embed.integrations.qdrant.stores.server import ServerStore

    with (
        reading(collection, Storage(url=url, api_key=api_key)) as server,
        contextlib.closing(open_collection(collection, Storage(edge=edge))) as shard,
    ):
        assert isinstance(server, ServerStore)
        assert isinstance(shard, EdgeStore)
        shard.create(server.require_signature(), server.write_snapshot)
        say(f"{shard.name}: {shard.count()} images, from {server.location}")
