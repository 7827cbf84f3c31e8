"""Convert between LlamaIndex's nodes and images or search hits. Pure."""

from __future__ import annotations

import json
import mimetypes
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode, ImageNode, ImageType, Node, NodeWithScore, TextNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node

from cocoa_embed.errors import ImageError
from cocoa_embed.integrations.qdrant.points import plain_payload, with_node_fields

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.indexer import Hit

PATH_KEYS = ("path", "image_path")
TEXT_KEYS = ("caption", "text", "page_content")
"""The payload keys of a path and a text: the indexer's, those of LlamaIndex's older stores and of LangChain."""


def image_of(node: BaseNode) -> ImageType | None:
    """Return the image of a node: its bytes, or else its path or address; None if it has none.

    :raises ImageError: If the node's bytes are not in base64.
    """
    data: str | bytes | None
    if isinstance(node, ImageNode):
        data, source = node.image, node.image_path or node.image_url
    elif isinstance(node, Node) and node.image_resource is not None:
        resource = node.image_resource
        data, source = resource.data, str(resource.path or resource.url or "") or None
    else:
        return None
    if not data:
        return source
    try:
        return BytesIO(b64decode(data))
    except Base64Error as error:
        raise ImageError(f"node {node.node_id}", f"holds an image that is not in base64 ({error})") from error


def split_by_image(nodes: Sequence[BaseNode]) -> tuple[list[tuple[BaseNode, ImageType]], list[BaseNode]]:
    """Return the nodes that have an image, each with it, and those that have none.

    :raises ImageError: If the image in a node is not in base64.
    """
    pairs = [(node, image_of(node)) for node in nodes]
    images = [(node, image) for node, image in pairs if image is not None]
    return images, [node for node, image in pairs if image is None]


def to_node(hit: Hit) -> NodeWithScore:
    """Return a hit as a node of LlamaIndex, an ``ImageNode`` with ``image_path`` if the point is an image.

    A point that the indexer or LlamaIndex wrote becomes the stored node. Any other point, or one whose node cannot be
    read, becomes a node with the path and the caption or text of its payload, and the other keys as metadata.
    """
    return NodeWithScore(node=stored_node(node_payload(hit)) or described_node(hit), score=hit.score)


def node_payload(hit: Hit) -> dict[str, Any]:
    """Return the payload of a hit with the fields of LlamaIndex, and the path of a file that exists, if one does.

    They are made from the fields of the indexer, which stores LlamaIndex's on request only.
    """
    if hit.payload.get("sha256") and hit.payload.get("paths"):
        return with_node_fields({**plain_payload(hit.payload), "path": hit.path})
    return hit.payload


def stored_node(payload: dict[str, Any]) -> BaseNode | None:
    """Return the LlamaIndex node that is stored in a payload; None if there is none that can be read.

    An ``ImageDocument``, or another node with an image beside its text, becomes an ``ImageNode``: LlamaIndex itself
    fails on such a point or drops the image.
    """
    try:
        fields = json.loads(payload["_node_content"])
        image = fields.get("image_resource") or {}
        if not (image.get("path") or image.get("url")):
            return metadata_dict_to_node(payload)
        text = (fields.get("text_resource") or {}).get("text")
        return ImageNode(**{**fields, "text": text or "", "image_resource": image})
    except (LookupError, ValueError, TypeError, AttributeError):
        return None  # other programs may store anything under this key


def described_node(hit: Hit) -> BaseNode:
    """Return a node made from a payload that holds no LlamaIndex node."""
    metadata = plain_payload(hit.payload)
    path = next(texts(metadata, PATH_KEYS), None)
    mime = next(texts(metadata, ["mime"]), None) or (path and mimetypes.guess_type(path)[0]) or "image/*"
    text_key = next((key for key in TEXT_KEYS if any(texts(metadata, [key]))), None)
    text = "" if text_key is None else metadata.pop(text_key)
    if path is None or not mime.startswith("image/"):
        return TextNode(id_=hit.id, text=text, metadata=metadata)
    return ImageNode(id_=hit.id, text=text, metadata=metadata, image_path=path)


def texts(payload: Mapping[str, Any], keys: Iterable[str]) -> Iterator[str]:
    """Yield the values under ``keys`` that are texts and not empty."""
    return (value for key in keys if isinstance(value := payload.get(key), str) and value)
