"""An image's content as a Qdrant point: its id, and a payload that LlamaIndex reads back as an ``ImageNode``. Pure."""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Payload = dict[str, Any]

NAMESPACE = uuid.UUID("6f1d3c52-8f0e-5f57-9a3c-0c0a1e3b7d11")
"""The UUID namespace of point ids. Changing it would index everything a second time."""

NODE_KEYS = frozenset({"_node_content", "_node_type", "document_id", "doc_id", "ref_doc_id"})
"""The payload keys that are there for LlamaIndex alone."""

MODEL_KEYS = frozenset({"relative_path", "metadata"})
"""The payload keys that LlamaIndex shows to a language model beside the node's text, which is the caption."""

NO_WORDS: Payload = {"caption": None, "metadata": {}, "words_from": None}


@dataclass(frozen=True)
class Description:
    """Where an image file is, and what ``metadata.jsonl`` says of it."""

    path: Path
    """Absolute."""
    relative_path: str
    """Relative to the folder that was indexed."""
    caption: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of ``metadata.jsonl``."""
    words_from: str | None = None
    """The ``metadata.jsonl`` that says something of the file, as a payload names it."""
    silent: frozenset[str] = frozenset()
    """Those that were read and might have said something."""

    @property
    def words(self) -> Payload:
        """The part of a payload that is not of the file itself: ``caption``, ``metadata`` and where they are from."""
        caption = None if self.caption is None else storable(self.caption)
        return {"caption": caption, "metadata": storable(dict(self.metadata)), "words_from": self.words_from}


class Place(NamedTuple):
    """A file that holds a content, as a payload names it."""

    path: str
    """Absolute."""
    relative_path: str
    mtime: float
    """When the file was last changed, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """What is known of one image content, and of the files that hold it."""

    places: Sequence[Place]
    """At least one; the first gives the payload its ``path``."""
    words: Payload
    """``caption``, ``metadata`` and ``words_from``."""
    sha256: str
    """Of the file's bytes, in hexadecimal."""
    bytes: int
    width: int
    """In pixels, upright."""
    height: int
    mime: str
    thumbnail: str | None = None
    """The path of a small copy."""


def point_id(sha256: str) -> str:
    """Return the id of the point that holds the content of this hash: a UUID, the same on every machine.

    :param sha256: 64 hexadecimal digits.
    :raises ValueError: If it is anything else.
    """
    if len(sha256) != 64 or len(bytes.fromhex(sha256)) != 32:
        raise ValueError(f"expected 64 hexadecimal digits of a SHA-256, got {len(sha256)} characters: {sha256!r}")
    return str(uuid.uuid5(NAMESPACE, sha256.lower()))


def payload(record: ImageRecord) -> Payload:
    """Return a point's payload: the record's fields, and the same as a LlamaIndex node. Never the image itself."""
    fields: Payload = {
        **place_fields(record.places),
        "sha256": record.sha256,
        "bytes": record.bytes,
        "width": record.width,
        "height": record.height,
        "mime": record.mime,
        **record.words,
    }
    if record.thumbnail is not None:
        fields["thumbnail"] = record.thumbnail
    return {**fields, **node_fields(point_id(record.sha256), fields)}


def place_fields(places: Sequence[Place]) -> Payload:
    """Return the fields of a payload that say where the content is: the first file, then all of them, side by side."""
    first = places[0]
    return {
        "path": first.path,
        "relative_path": first.relative_path,
        "mtime": first.mtime,
        "paths": [place.path for place in places],
        "relative_paths": [place.relative_path for place in places],
        "mtimes": [place.mtime for place in places],
    }


def stored_places(stored: Mapping[str, Any]) -> list[Place]:
    """Return the files that a payload names; none, if others wrote it."""
    columns = [stored.get(key) or [] for key in ("paths", "relative_paths", "mtimes")]
    return [Place(*place) for place in zip(*columns, strict=False)]


def node_fields(node_id: str, fields: Payload) -> Payload:
    """Return what ``llama_index.core.vector_stores.utils.node_to_metadata_dict`` adds to a node's metadata.

    Written by hand, so that the indexer needs no LlamaIndex; a test holds the two together. The node's source document
    is the point itself, so that deleting by document id deletes the point.

    :param node_id: The point's id.
    :param fields: The node's metadata: the payload without these fields.
    """
    hidden_keys = sorted(key for key, value in fields.items() if key not in MODEL_KEYS or not value)
    source: Payload = {
        "node_id": node_id,
        "node_type": "4",
        "metadata": {},
        "hash": None,
        "class_name": "RelatedNodeInfo",
    }
    node = {
        "id_": node_id,
        "embedding": None,
        "metadata": fields,
        "excluded_embed_metadata_keys": sorted(fields),
        "excluded_llm_metadata_keys": hidden_keys,
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
    return {
        "_node_content": json.dumps(node, ensure_ascii=False),
        "_node_type": "ImageNode",
        "document_id": node_id,
        "doc_id": node_id,
        "ref_doc_id": node_id,
    }


def plain_payload(stored: Mapping[str, Any]) -> Payload:
    """Return a payload without the fields that are there for LlamaIndex alone."""
    return {key: value for key, value in stored.items() if key not in NODE_KEYS}


def changed_payload(
    stored: Mapping[str, Any],
    *,
    places: Sequence[Place],
    words: Payload | None = None,
    thumbnail: str | None = None,
) -> Payload:
    """Return a stored payload for the same content, held by other files, with other words or another thumbnail.

    :param stored: The payload as it is.
    :param places: The files that hold the content now; at least one.
    :param words: ``caption`` and ``metadata``; None leaves those that are stored.
    :param thumbnail: The path of a small copy; None leaves what is stored.
    """
    fields = {**plain_payload(stored), **place_fields(places), **(words or {})}
    if thumbnail is not None:
        fields["thumbnail"] = thumbnail
    return {**fields, **node_fields(str(stored["doc_id"]), fields)}


def storable(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    r"""Return a JSON value whose strings are valid Unicode and whose numbers are finite, as a server demands.

    The undecodable bytes of a file's name, which Python holds as lone surrogates, become ``\udcNN``; a number such as
    1e999, which is infinite to Python, becomes null.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {storable(key): storable(element) for key, element in value.items()}
    if isinstance(value, list):
        return [storable(element) for element in value]
    return value
