"""Any multimodal SentenceTransformer, loaded with clear errors and asked for embeddings in one way.

Inputs are always dictionaries, ``{"text": ...}``, ``{"image": ...}`` or both: sentence-transformers guesses what a bare
string is, and takes a query that is the name of a file for an image. Queries get the model's query prompt, everything
that is stored its document prompt, here and nowhere else.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.images import ImageSource, load_image

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modality import Modality

Item: TypeAlias = Mapping[str, "str | Image.Image"]

MODALITIES: dict[frozenset[str], Modality] = {
    frozenset({"text"}): "text",
    frozenset({"image"}): "image",
    frozenset({"image", "text"}): ("image", "text"),
}
"""What sentence-transformers calls an item of these keys."""

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def load_model(model: str | Path, device: str | None = None) -> SentenceTransformer:
    """Load a SentenceTransformer from a folder, or by its name (``owner/name``) from the Hugging Face hub.

    :param model: A folder; where there is none of that name, a name on the hub.
    :param device: The torch device; None takes the fastest there is.
    :raises CocoaError: If the folder is missing, is no SentenceTransformer, has no weights, or cannot be loaded.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        check_model_folder(folder)
    elif not is_hub_name(str(model)):
        raise CocoaError(
            f"{printable(model)}: there is no such model folder; name a folder that cocoa-embed export wrote,"
            " or a model on the Hugging Face hub as owner/name"
        )
    from sentence_transformers import SentenceTransformer

    is_local = folder.exists()
    try:
        return SentenceTransformer(str(folder if is_local else model), device=device, local_files_only=is_local)
    except Exception as error:  # loading runs code of four libraries, each with errors of its own
        raise CocoaError(
            f"{printable(model)} cannot be loaded as a SentenceTransformer ({type(error).__name__}: {one_line(error)})"
        ) from error


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that is no SentenceTransformer or holds no weights.

    :raises CocoaError: If it is.
    """
    name = printable(folder)
    if not folder.is_dir():
        raise CocoaError(f"{name} is a file; a model is a folder, as cocoa-embed export writes it")
    if not (folder / "modules.json").is_file():
        raise CocoaError(
            f"{name} is no SentenceTransformer (it has no modules.json); name a folder that cocoa-embed export wrote"
        )
    if not any(True for pattern in WEIGHT_FILES for _ in folder.rglob(pattern)):
        raise CocoaError(
            f"{name} has no weights (no *.safetensors in it); copy them there or run cocoa-embed export again"
        )


def is_hub_name(name: str) -> bool:
    """Tell whether a name can only mean a model on the hub: ``owner/name``, where ``owner`` is no folder here."""
    owner, slash, rest = name.partition("/")
    is_path = name.startswith((".", "~", os.sep)) or "/" in rest or "\\" in name
    return bool(owner and slash and rest) and not is_path and not Path(owner).exists()


def make_item(text: str | None = None, image: ImageSource | None = None) -> Item:
    """Return the input that stands for a text, an image, or both as one.

    :raises UsageError: If there is neither; an empty text is none. If the text is no valid Unicode.
    :raises ImageError: If the image cannot be used.
    """
    if not text and image is None:
        raise UsageError("neither a text nor an image was given; give one of them, or both")
    if text:
        require_unicode(text)
    item: dict[str, str | Image.Image] = {}
    if image is not None:
        item["image"] = load_image(image)
    if text:
        item["text"] = text
    return item


def require_unicode(text: str) -> None:
    """Refuse a text that cannot be encoded; Python holds a command line's undecodable bytes as lone surrogates.

    :raises UsageError: If it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the text {text!a} is not valid Unicode; give it in UTF-8") from None


class Encoder:
    """A model behind a lock, which several threads may ask for embeddings."""

    def __init__(self, model: SentenceTransformer, name: str = "the model") -> None:
        """Wrap a loaded model; ``name`` is what errors call it."""
        self.model = model
        self.name = name
        self._lock = threading.Lock()
        self._dimension: int | None = None

    @property
    def dimension(self) -> int:
        """The length of an embedding; measured, where the model does not know."""
        if self._dimension is None:
            dimension = self.model.get_embedding_dimension()
            self._dimension = dimension or self.embed_queries([{"text": "dimension"}]).shape[1]
        return self._dimension

    def require_images(self) -> None:
        """Refuse a model that knows only text.

        :raises CocoaError: If it does not take images.
        """
        if not self.model.supports("image"):
            raise CocoaError(f"{self.name} does not embed images; use a multimodal model")

    def embed_queries(self, items: Sequence[Item], batch_size: int = 32) -> np.ndarray:
        """Embed what is asked, with the model's query prompt.

        :return: Array of shape ``(len(items), dimension)``, float32.
        :raises CocoaError: If the model does not take such items, or one of them.
        """
        self._check(items)
        try:
            with self._lock:
                embeddings = self.model.encode_query(list(items), batch_size=batch_size, show_progress_bar=False)
        except ValueError as error:
            # What a processor refuses: an image much longer than wide, a text with the token that stands for an image.
            raise CocoaError(f"{self.name} does not take the query ({one_line(error)})") from error
        return np.asarray(embeddings, dtype=np.float32)

    def embed_documents(self, items: Sequence[Item], batch_size: int = 32) -> np.ndarray:
        """Embed what is stored, with the model's document prompt.

        :return: Array of shape ``(len(items), dimension)``, float32.
        :raises CocoaError: If the model does not take such items.
        """
        self._check(items)
        with self._lock:
            embeddings = self.model.encode_document(list(items), batch_size=batch_size, show_progress_bar=False)
        return np.asarray(embeddings, dtype=np.float32)

    def _check(self, items: Sequence[Item]) -> None:
        for item in items:
            if isinstance(text := item.get("text"), str):
                require_unicode(text)
        for keys in {frozenset(item) for item in items}:
            if not self.model.supports(MODALITIES[keys]):
                together = " together" if len(keys) > 1 else ""
                raise CocoaError(f"{self.name} does not embed {' and '.join(sorted(keys))}{together}")
