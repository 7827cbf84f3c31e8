"""An image content as a Qdrant point: its id, and a payload that LlamaIndex reads back as an ``ImageNode``."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Payload = dict[str, Any]

NAMESPACE = uuid.UUID("6f1d3c52-8f0e-5f57-9a3c-0c0a1e3b7d11")
"""The UUID namespace of point ids; another one would index every image a second time."""

NODE_KEYS = frozenset({"_node_content", "_node_type", "document_id", "doc_id", "ref_doc_id"})
"""The payload keys that only LlamaIndex reads."""

LLM_KEYS = frozenset({"relative_path", "metadata"})
"""The payload keys that LlamaIndex shows to a language model beside the node's text, which is the caption."""


@dataclass(frozen=True)
class ImageFile:
    """An image file and its description in ``metadata.jsonl`` files."""

    path: Path
    """Absolute."""
    relative_path: str
    """Relative to the folder that is indexed."""
    caption: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of ``metadata.jsonl``."""
    caption_source: str | None = None
    """The first metadata file that has a row for the file, as the payload names it."""
    checked_sources: frozenset[str] = frozenset()
    """The metadata files, read without a fault, that could have a row for the file."""

    @property
    def stored_path(self) -> str:
        """The path as the payload has it."""
        return storable(str(self.path))

    @property
    def description(self) -> Payload:
        """The part of the payload that comes from ``metadata.jsonl``."""
        text, columns = storable(self.caption), storable(dict(self.metadata))
        return {"caption": text, "metadata": columns, "caption_source": self.caption_source}

    def location(self, mtime: float) -> "FileLocation":
        """Return the location of the file as the payload has it."""
        return FileLocation(self.stored_path, storable(self.relative_path), mtime)


class FileLocation(NamedTuple):
    """A file that holds a content, as the payload has it."""

    path: str
    """Absolute."""
    relative_path: str
    mtime: float
    """Seconds since 1970."""


def point_id(sha256: str) -> str:
    """Return the id of the point for a content: a UUID, the same on every machine.

    :param sha256: 64 hexadecimal digits, in lower case.
    """
    return str(uuid.uuid5(NAMESPACE, sha256))


def make_payload(
    content: Payload, locations: Sequence[FileLocation], description: Payload, thumbnail: str | None = None
) -> Payload:
    """Return the payload of a point: these fields, and the same as a LlamaIndex node. It never holds the image.

    :param content: ``sha256`` and ``bytes`` of the file, ``width`` and ``height`` of the upright image in pixels, and
        ``mime``; or a stored payload, whose other fields are replaced where the arguments give them.
    :param locations: The files with this content, at least one: the first as single fields, all as parallel lists.
    :param description: ``caption``, ``metadata`` and ``caption_source``; empty to keep those of a stored payload.
    :param thumbnail: The path of a small copy.
    """
    lists = {f"{name}s": [getattr(each, name) for each in locations] for name in FileLocation._fields}
    fields = {**plain_payload(content), **locations[0]._asdict(), **lists, **description}
    if thumbnail is not None:
        fields["thumbnail"] = thumbnail
    return {**fields, **node_fields(point_id(fields["sha256"]), fields)}


def stored_locations(stored: Mapping[str, Any]) -> list[FileLocation]:
    """Return the locations in a payload; none if another program wrote it."""
    columns = [stored.get(key) or [] for key in ("paths", "relative_paths", "mtimes")]
    return [FileLocation(*row) for row in zip(*columns, strict=False)]


def node_fields(node_id: str, fields: Payload) -> Payload:
    """Return what ``llama_index.core.vector_stores.utils.node_to_metadata_dict`` adds to a node's metadata.

    Written out here so that the indexer works without LlamaIndex; a test compares the two. The node's source document
    is the point itself, so that deleting by document id deletes the point.

    :param node_id: The id of the point.
    :param fields: The node's metadata: the payload without these fields.
    """
    source: Payload = {"node_id": node_id, "node_type": "4", "metadata": {}, "hash": None}
    source["class_name"] = "RelatedNodeInfo"
    node = {
        "id_": node_id,
        "embedding": None,
        "metadata": fields,
        "excluded_embed_metadata_keys": sorted(fields),
        "excluded_llm_metadata_keys": sorted(key for key in fields if key not in LLM_KEYS or not fields[key]),
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
    return {"_node_content": json.dumps(node, ensure_ascii=False), "_node_type": "ImageNode", **ids}


def plain_payload(stored: Mapping[str, Any]) -> Payload:
    """Return a payload without the fields that only LlamaIndex reads."""
    return {key: value for key, value in stored.items() if key not in NODE_KEYS}


def storable(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    r"""Return a JSON value with valid Unicode, as a server requires.

    Undecodable bytes of a file name, which Python has as lone surrogates, become ``\udcNN``.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {storable(key): storable(element) for key, element in value.items()}
    if isinstance(value, list):
        return [storable(element) for element in value]
    return value
