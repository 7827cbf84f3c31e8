"""LlamaIndex's nodes: the image that one holds, and the node that a search has found. Pure."""

from __future__ import annotations

import json
import mimetypes
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from cocoa_embed.errors import ImageError, require
from cocoa_embed.integrations.qdrant.points import plain_payload

require("llama_index.core", "llama-index")

from llama_index.core.schema import BaseNode, ImageNode, ImageType, Node, NodeWithScore, TextNode  # noqa: E402
from llama_index.core.vector_stores.utils import metadata_dict_to_node  # noqa: E402

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.indexer import Hit

PATH_KEYS = ("path", "image_path")
TEXT_KEYS = ("caption", "text", "page_content")
"""Where the payloads of the indexer, of LlamaIndex's older stores and of LangChain hold a path and a text."""

NODE_FIELDS = (
    "id_",
    "metadata",
    "excluded_embed_metadata_keys",
    "excluded_llm_metadata_keys",
    "relationships",
    "metadata_template",
    "metadata_separator",
    "text_template",
)
"""The fields that every kind of stored node has."""


def image_of(node: BaseNode) -> ImageType | None:
    """Return the image that a node holds: its bytes, or else its path or its address; None if it holds none.

    :raises ImageError: If the node's bytes are not in base64.
    """
    if isinstance(node, ImageNode):
        return image_in(node, node.image, node.image_path or node.image_url)
    if isinstance(node, Node) and node.image_resource is not None:
        resource = node.image_resource
        place = resource.path or resource.url
        return image_in(node, resource.data, None if place is None else str(place))
    return None


def image_in(node: BaseNode, data: str | bytes | None, place: str | None) -> ImageType | None:
    """Return the image that ``data`` holds in base64, or the place where it is.

    :raises ImageError: If ``data`` is no base64.
    """
    if not data:
        return place
    try:
        return BytesIO(b64decode(data))
    except Base64Error as error:
        raise ImageError(f"node {node.node_id}", f"holds an image that is not in base64 ({error})") from error


def split_by_image(nodes: Sequence[BaseNode]) -> tuple[list[tuple[BaseNode, ImageType]], list[BaseNode]]:
    """Return the nodes that hold an image, each with it, and those that hold none.

    :raises ImageError: If the image in a node is not in base64.
    """
    images, texts = [], []
    for node in nodes:
        image = image_of(node)
        if image is None:
            texts.append(node)
        else:
            images.append((node, image))
    return images, texts


def to_node(hit: Hit) -> NodeWithScore:
    """Return a hit as LlamaIndex's node: an ``ImageNode`` with ``image_path`` wherever the point is of an image.

    What the indexer or LlamaIndex wrote becomes the node that was stored. A point that something else wrote, or whose
    node cannot be read, becomes a node of what its payload says: its path, its caption or text, the rest as metadata.
    """
    return NodeWithScore(node=stored_node(hit.payload) or described_node(hit), score=hit.score)


def stored_node(payload: dict[str, Any]) -> BaseNode | None:
    """Return the node that LlamaIndex has in a payload, or None if there is none that can be read.

    A stored ``ImageDocument``, or other node with an image beside its text, becomes an ``ImageNode``: LlamaIndex itself
    fails on such a point or leaves the image out.
    """
    try:
        fields = json.loads(payload["_node_content"])
        image = fields.get("image_resource") or {}
        if not (image.get("path") or image.get("url")):
            return metadata_dict_to_node(payload)
        text = (fields.get("text_resource") or {}).get("text")
        common = {name: fields[name] for name in NODE_FIELDS if name in fields}
        return ImageNode(text=text or "", image_resource=image, **common)
    except (LookupError, ValueError, TypeError, AttributeError):
        return None  # what others have under this key may be anything


def described_node(hit: Hit) -> BaseNode:
    """Return a node of what the payload of a point says that holds no node of LlamaIndex."""
    metadata = plain_payload(hit.payload)
    path = next(texts(metadata, PATH_KEYS), None)
    mime = next(texts(metadata, ["mime"]), None) or (path and mimetypes.guess_type(path)[0]) or "image/*"
    text_key = next((key for key in TEXT_KEYS if any(texts(metadata, [key]))), None)
    text = "" if text_key is None else metadata.pop(text_key)
    if path is None or not mime.startswith("image/"):
        return TextNode(id_=hit.id, text=text, metadata=metadata)
    return ImageNode(id_=hit.id, text=text, metadata=metadata, image_path=path)


def texts(payload: Mapping[str, Any], keys: Iterable[str]) -> Iterator[str]:
    """Yield a payload's values under ``keys`` that are texts with something in them."""
    return (value for key in keys if isinstance(value := payload.get(key), str) and value)
