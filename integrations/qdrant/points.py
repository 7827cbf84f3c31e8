"""The content of an image as a Qdrant point: its id, and its payload, which becomes an ``ImageNode`` of LlamaIndex."""

import json
import re
import uuid
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cocoa_embed.sources.base import Record, storable

Payload = dict[str, Any]

NAMESPACE = uuid.UUID("6f1d3c52-8f0e-5f57-9a3c-0c0a1e3b7d11")
"""The UUID namespace of point ids; another one would index every image a second time."""

NODE_KEYS = frozenset({"_node_content", "_node_type", "document_id", "doc_id", "ref_doc_id"})
"""The payload keys that only LlamaIndex reads."""

MTIME_TOLERANCE = 1e-6
"""The difference in seconds up to which two mtimes are equal."""

LOCATION_KEYS = ("paths", "relative_paths", "mtimes")
"""The payload keys of the files that hold the content: parallel lists."""

HELD_KEYS = ("sha256", *LOCATION_KEYS, "shard")
"""The payload keys that say where the images of a point are."""

REVISION = "revision"
"""The payload key that counts the changes of a stored point."""

PLACE_KEYS = frozenset({"shard", "page", "seconds"})
"""The payload keys of an image that is in an archive, a table, a document or a video."""

PLACE = re.compile(r"#(?:page=(?P<page>\d+)|t=(?P<seconds>\d+(?:\.\d+)?))$")
"""Matches the end of the key of a page of a document, or of a frame of a video."""

LLM_KEYS = frozenset({"relative_path", "metadata"})
"""The payload keys that LlamaIndex shows to a language model in addition to the node's text, which is the caption."""


class FileLocation(NamedTuple):
    """A file, or a place in a shard, that holds the content, as stored in the payload."""

    path: str
    """Absolute, or a URL."""
    relative_path: str
    mtime: float
    """Seconds since 1970; 0 where that is unknown."""


def location_of(record: Record) -> FileLocation:
    """Return the location of a record as stored in the payload."""
    return FileLocation(storable(record.key), storable(record.relative_key), record.mtime)


def describe(record: Record) -> Payload:
    """Return the part of the payload that comes from a record's metadata."""
    columns = storable(dict(record.metadata))
    text = columns.pop("text", None)
    return {"caption": text, "metadata": columns, "caption_source": storable(record.metadata_source)}


def caption_of(payload: Mapping[str, Any]) -> str | None:
    """Return the caption of a payload as it is embedded; None if it is missing or blank."""
    caption = payload.get("caption")
    return caption if isinstance(caption, str) and caption.strip() else None


def point_id(sha256: str) -> str:
    """Return the id of the point for content: a UUID, the same on every machine.

    :param sha256: 64 hexadecimal digits, in lower case.
    """
    return str(uuid.uuid5(NAMESPACE, sha256))


def make_payload(
    content: Payload,
    locations: Sequence[FileLocation],
    description: Payload,
    thumbnail: str | None = None,
    *,
    shards: Iterable[str] = (),
    llama_index: bool = False,
) -> Payload:
    """Return the payload of a point. It never holds the image.

    :param content: ``sha256`` and ``bytes`` of the file, ``width`` and ``height`` of the upright image in pixels, and
        ``mime``; or a stored payload, whose other fields are replaced where the arguments give them.
    :param locations: The files with this content, at least one: the first as single fields, all as parallel lists.
    :param description: ``caption``, ``metadata`` and ``caption_source``; empty to keep those of a stored payload.
    :param thumbnail: The path of a small copy.
    :param shards: The archives, tables and documents that new locations are in.
    :param llama_index: Whether to add the fields that LlamaIndex's own ``QdrantVectorStore`` reads; a stored payload
        that has them keeps them.
    """
    lists = {f"{name}s": [getattr(each, name) for each in locations] for name in FileLocation._fields}
    fields = {**plain_payload(content), **locations[0]._asdict(), **lists, **description}
    fields = {**without(PLACE_KEYS, fields), **place_fields(locations, [*shards_of(content), *shards])}
    if thumbnail is not None:
        fields["thumbnail"] = thumbnail
    return with_node_fields(fields) if llama_index or "_node_content" in content else fields


def place_fields(locations: Sequence[FileLocation], shards: Iterable[str]) -> Payload:
    """Return where in shards the content is: ``shard`` of all locations, ``page`` or ``seconds`` of the first.

    :param shards: The keys of the shards that the locations may be in. The field is a list if they are in several.
    """
    held = [shard for shard in dict.fromkeys(shards) if any(is_in_shard(each.path, shard) for each in locations)]
    if not held:
        return {}
    fields: Payload = {"shard": held[0] if len(held) == 1 else held}
    first = locations[0].path
    place = PLACE.search(first) if any(is_in_shard(first, shard) for shard in held) else None
    if place is None:
        return fields
    return fields | ({"page": int(place["page"])} if place["page"] else {"seconds": float(place["seconds"])})


def shards_of(stored: Mapping[str, Any]) -> list[str]:
    """Return the keys of the shards that hold the content of a stored payload."""
    shards = stored.get("shard") or []
    return [shards] if isinstance(shards, str) else list(shards)


def is_in_shard(path: str, shard: str) -> bool:
    """Return whether the path of an image is that of one in an archive, a table or a document."""
    return path.startswith(f"{shard}#")


def stored_locations(stored: Mapping[str, Any]) -> list[FileLocation]:
    """Return the locations in a payload; none if another program wrote it."""
    columns = [stored.get(key) or [] for key in LOCATION_KEYS]
    return [FileLocation(*row) for row in zip(*columns, strict=False)]


def own_locations(id_: str, stored: Mapping[str, Any]) -> list[FileLocation]:
    """Return the locations of a point of the indexer, by id and payload with at least ``HELD_KEYS``.

    A point that another program wrote has none, even if it has a copy of a payload, as a LlamaIndex node may that was
    made from a search hit.
    """
    return stored_locations(stored) if id_ == point_id(str(stored.get("sha256"))) else []


def with_node_fields(fields: Payload) -> Payload:
    """Return a payload of the indexer with the fields that LlamaIndex reads; it has none of them yet.

    They are what ``llama_index.core.vector_stores.utils.node_to_metadata_dict`` adds to a node's metadata, written out
    here so that the indexer works without LlamaIndex; a test compares the two. The node's source document is the point
    itself, so that deleting by document id deletes the point.
    """
    node_id, metadata = point_id(fields["sha256"]), without({REVISION}, fields)
    source: Payload = {"node_id": node_id, "node_type": "4", "metadata": {}, "hash": None}
    source["class_name"] = "RelatedNodeInfo"
    node = {
        "id_": node_id,
        "embedding": None,
        "metadata": metadata,
        "excluded_embed_metadata_keys": sorted(metadata),
        "excluded_llm_metadata_keys": sorted(key for key in metadata if key not in LLM_KEYS or not metadata[key]),
        "relationships": {"1": source},
        "metadata_template": "{key}: {value}",
        "metadata_separator": "\n",
        "text": fields["caption"] or "",
        "mimetype": "text/plain",
        "start_char_idx": None,
        "end_char_idx": None,
        "text_template": "{metadata_str}\n\n{content}",
        "image": None,
        "image_path": fields["path"],
        "image_url": None,
        "image_mimetype": fields["mime"],
        "text_embedding": None,
        "class_name": "ImageNode",
    }
    ids = dict.fromkeys(("document_id", "doc_id", "ref_doc_id"), node_id)
    return {**fields, "_node_content": json.dumps(node, ensure_ascii=False), "_node_type": "ImageNode", **ids}


def plain_payload(stored: Mapping[str, Any]) -> Payload:
    """Return a payload without the fields that only LlamaIndex reads."""
    return without(NODE_KEYS, stored)


def without(keys: Container[str], payload: Mapping[str, Any]) -> Payload:
    """Return a payload without some of its keys."""
    return {key: value for key, value in payload.items() if key not in keys}


def is_same_moment(one: float, other: float) -> bool:
    """Return whether two mtimes are equal; a stored one has passed through JSON."""
    return abs(one - other) < MTIME_TOLERANCE


def is_same_json(one: Payload | None, other: Payload | None) -> bool:
    """Return whether two payloads are equal as JSON, where 1 and true differ."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
