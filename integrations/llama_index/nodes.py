"""Convert between LlamaIndex's nodes and images or search hits."""

from __future__ import annotations

import json
import logging
import mimetypes
import os
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import BaseContentBlock, ImageBlock, TextBlock
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, ImageNode, ImageType, MetadataMode, Node, NodeWithScore, TextNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node

from cocoa_embed.errors import CocoaError, ImageError, UsageError, printable
from cocoa_embed.images.load import ImageSource, decode_image, load_image, read_image_source
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.points import plain_payload, point_id, with_node_fields
from cocoa_embed.sources.files import is_deleted
from cocoa_embed.sources.keys import read_key, shown_key

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.indexer import Hit

logger = logging.getLogger(__name__)

CHAT_PIXELS = 1536
"""The pixels of the longer side of an image for a chat model; small print on a page is legible."""
PATH_KEYS = ("path", "image_path")
TEXT_KEYS = ("caption", "text", "page_content")
"""The payload keys of a path and a text: the indexer's, those of LlamaIndex's older stores and of LangChain."""

LONGEST_PATH = 4096
"""Characters of a path; what is longer, such as base64, is not looked up, and not repeated in errors."""

URL_SAFE = str.maketrans("-_", "+/")
"""Maps the characters of URL-safe base64 to those of standard base64."""
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]")
BINARY_SAMPLE, BINARY_CONTROLS, BINARY_RATIO = 2000, 4, 0.05
"""A text is taken for binary if, of the first ``BINARY_SAMPLE`` characters, at least ``BINARY_CONTROLS`` and more than
``BINARY_RATIO`` are control characters."""


def image_of(node: BaseNode) -> str | BytesIO | None:
    """Return the image of a node: its bytes or ``data:`` URI, or else its path or address; None if it has none.

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
    text = data if isinstance(data, str) else data.decode("ascii", "replace")
    header, comma, payload = text.partition(",")
    if comma and header[:5].lower() == "data:":
        is_base64 = header.lower().rstrip().endswith(";base64")
        return f"{header},{payload.translate(URL_SAFE) if is_base64 else payload}"
    try:
        encoded = "".join(text.split()).translate(URL_SAFE).rstrip("=")
        return BytesIO(b64decode(encoded + "=" * (-len(encoded) % 4), validate=True))
    except ValueError as error:
        raise ImageError(f"node {node.node_id}", f"holds an image that is not in base64 ({error})") from error


def load_source(source: ImageSource, allowed_hosts: Sequence[str]) -> ImageSource:
    """Load an image given by its path, address or ``data:`` URI; return one of any other form unchanged.

    :raises ImageError: If it cannot be used.
    """
    if not isinstance(source, str | Path):
        return source
    name, data = read_source(source, allowed_hosts)
    return decode_image(data, name)[0]


def read_source(source: ImageSource, allowed_hosts: Sequence[str]) -> tuple[str, bytes]:
    """Return the name of an image for errors, and the bytes of its file.

    :param source: A path or an address (``read_key``), a ``data:`` URI, or the bytes; no PIL image.
    :param allowed_hosts: The hosts from which images may be fetched, as for ``Fetcher``.
    :raises ImageError: If it cannot be read.
    :raises UsageError: If it is something else.
    """
    if not isinstance(source, str | Path | bytes | BytesIO):
        kind = type(source).__name__
        raise UsageError(f"the image is a {kind}; give one image: a path, an address, bytes, or a PIL image")
    if not isinstance(source, str | Path) or str(source)[:5].lower() == "data:":
        data, name = read_image_source(source)
        return name, data
    key = str(source)
    if len(key) > LONGEST_PATH and "://" not in key:
        reason = f"has {len(key)} characters and is no path; give base64 as ImageNode(image=...) or as a data: URI"
        raise ImageError(f"{printable(key[:40])}...", reason)
    return shown_key(key), read_key(key, allowed_hosts)


def text_of(node: BaseNode) -> str:
    """Return the text that is embedded with a node's image: its own text and its metadata; empty if it has no text."""
    has_text = isinstance(node, (TextNode, Node)) and node.get_content(MetadataMode.NONE).strip()
    return node.get_content(MetadataMode.EMBED) if has_text else ""


def refuse_other_media(node: BaseNode) -> None:
    """Refuse a node with nothing to embed: an image node without its image, or a sound or video without a text.

    A text may be empty, as a blank page is.

    :raises CocoaError: If it is one.
    """
    is_text = not isinstance(node, ImageNode) and not (
        isinstance(node, Node) and (node.image_resource or node.audio_resource or node.video_resource)
    )
    if not is_text and not text_of(node):
        raise CocoaError(
            f"node {node.node_id} ({node.class_name()}) holds neither an image nor a text, and nothing else can be"
            " embedded; give it one, or leave it out"
        )


def refuse_binary(text: str) -> None:
    """Refuse a text that is the content of a binary file, as LlamaIndex's ``SimpleDirectoryReader`` makes of images.

    :raises CocoaError: If it is one.
    """
    start = text[:BINARY_SAMPLE]
    controls = len(CONTROLS.findall(start))
    if controls >= BINARY_CONTROLS and controls > BINARY_RATIO * len(start):
        raise CocoaError(
            f"the text {start[:20]!a}... is the content of a binary file, such as an image, and not text;"
            " SimpleDirectoryReader reads images like this unless llama-index-readers-file is installed: install it, or"
            " index the folder with QdrantIndexer, or give ImageNode(image_path=...)"
        )


class StoredImage(ImageNode):
    """An image of a collection: a file, a page of a document, one image of an archive, or an address.

    Its bytes are read when they are asked for, and not kept. ``image_path`` is its path in the payload. Unlike other
    image nodes, it shows its text to a chat model.
    """

    _allowed_hosts: tuple[str, ...] = PrivateAttr(default=())
    _thumbnail: str = PrivateAttr(default="")

    def resolve_image(self) -> ImageType:
        """Return the path of the image if it is a file, or else its bytes, or those of its thumbnail.

        :raises ImageError: If none of them can be read.
        """
        if self.image and (source := image_of(self)) is not None:
            return BytesIO(read_image_source(source)[0])
        if self.image_path and os.path.isfile(self.image_path):
            return self.image_path
        try:
            return BytesIO(read_key(self.image_path or self.image_url or "", self._allowed_hosts))
        except ImageError:
            if not os.path.isfile(self._thumbnail):
                raise
            return BytesIO(read_key(self._thumbnail))

    def get_content_blocks(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> list[BaseContentBlock]:
        """Return what a chat model is shown: the text, and the image as an upright JPEG of at most ``CHAT_PIXELS``.

        If the image cannot be read, a warning is logged and only the text is returned.
        """
        text = self.get_content(metadata_mode).strip()
        blocks: list[BaseContentBlock] = [TextBlock(text=text)] if text else []
        try:
            data = draw_thumbnail(load_image(self.resolve_image()), CHAT_PIXELS)
        except ImageError as error:
            logger.warning("%s; a chat model is not shown the image", error)
            return blocks
        return [*blocks, ImageBlock(image=data, image_mimetype="image/jpeg")]


def to_node(hit: Hit, allowed_hosts: Sequence[str] = ()) -> NodeWithScore:
    """Return a hit as a node of LlamaIndex, a ``StoredImage`` with ``image_path`` if the point is an image.

    A point that the indexer or LlamaIndex wrote becomes the node that LlamaIndex's own store reads. Any other point, or
    one whose node cannot be read, becomes a node with the path and the caption or text of its payload, and the other
    keys as metadata.

    :param allowed_hosts: The hosts from which images on the web may be fetched once they are asked for.
    """
    node = own_node(hit) or stored_node(hit.payload) or described_node(hit)
    if isinstance(node, ImageNode):
        node = StoredImage(**dict(node))
        node._allowed_hosts = tuple(allowed_hosts)
        node._thumbnail = next(texts(hit.payload, ["thumbnail"]), "")
    return NodeWithScore(node=node, score=hit.score)


def own_node(hit: Hit) -> BaseNode | None:
    """Return the node for a point that the indexer wrote; None for any other.

    Its ``image_path`` is the first of the image's paths that exists, or else its thumbnail if that exists.
    """
    fields: dict[str, Any] = {"caption": None, "metadata": {}, **plain_payload(hit.payload), "path": hit.path}
    if not all(isinstance(fields.get(key), str) for key in ("path", "sha256", "mime")):
        return None
    if hit.id != point_id(fields["sha256"]):  # the metadata of another program's node may have these keys too
        return None
    node = stored_node(with_node_fields(fields))
    if isinstance(node, ImageNode):
        thumbnail = str(fields.get("thumbnail") or "")
        node.image_path = thumbnail if is_deleted(hit.path) and os.path.isfile(thumbnail) else hit.path
    return node


def stored_node(payload: dict[str, Any]) -> BaseNode | None:
    """Return the LlamaIndex node that is stored in a payload; None if there is none that can be read.

    An ``ImageDocument``, or another node with an image and a text, becomes an ``ImageNode``: LlamaIndex itself
    fails on such a point or drops the image.
    """
    try:
        fields = json.loads(payload["_node_content"])
        if not (fields.get("text_resource") or {}).get("text"):
            fields.pop("text_resource", None)  # a TextNode does not take one without a text
        image = fields.get("image_resource") or {}
        if not (image.get("path") or image.get("url")):
            return metadata_dict_to_node({**payload, "_node_content": json.dumps(fields)})
        return ImageNode(**fields)
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
