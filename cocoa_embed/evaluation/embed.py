"""What is embedded for an evaluation: texts and images that are read when their turn comes, and then forgotten."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.encode.encoder import MODALITIES, Encoder, ModelInput, require_unicode
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import CocoaError, ImageError, one_line, printable
from cocoa_embed.images.load import load_image

Role = Literal["query", "document"]

BATCH_TOKENS = 16384
"""The tokens of a batch where nothing else is asked for, as ``estimated_tokens`` counts them."""

MAX_BATCH_ITEMS = 256

IMAGES_AHEAD = 16
"""Images that are decoded while the model works on others."""

PIXELS_A_TOKEN = 28 * 28
"""Of a Qwen2-VL; for models that scale every image to one size the estimate is high, and batches are small."""

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Item:
    """A text, an image, or both as one.

    :param text: None where there is none; never empty.
    :param image: The path of an image, or the bytes of a file.
    """

    text: str | None = None
    image: str | bytes | None = None

    @property
    def parts(self) -> frozenset[str]:
        """What it is made of: ``text``, ``image`` or both."""
        return frozenset(part for part, value in (("text", self.text), ("image", self.image)) if value is not None)

    def under(self, folder: Path) -> Item:
        """Return the item with the path of its image, which starts from ``folder``."""
        return replace(self, image=str(folder / self.image)) if isinstance(self.image, str) else self

    def load(self) -> ModelInput:
        """Return what a model takes, the image decoded.

        :raises ImageError: If the image cannot be used.
        :raises UsageError: If the text is not valid Unicode.
        """
        loaded: dict[str, str | Image.Image] = {}
        if self.image is not None:
            loaded["image"] = load_image(self.image)
        if self.text is not None:
            require_unicode(self.text)
            loaded["text"] = self.text
        return loaded

    def __str__(self) -> str:
        """Return what the item is called in errors."""
        names = []
        if self.image is not None:
            names.append(f"the image {printable(self.image) if isinstance(self.image, str) else 'inside the table'}")
        if self.text is not None:
            short = self.text if len(self.text) <= SHOWN_CHARACTERS else f"{self.text[:SHOWN_CHARACTERS]}…"
            names.append(f"the text {short!r}")
        return " with ".join(names)


@dataclass(frozen=True)
class Embedded:
    """The embeddings of items.

    :param vectors: float32 ``[items, dimension]``; zero where there is none.
    :param broken: What is wrong with the images that cannot be used, by the number of the item.
    """

    vectors: np.ndarray
    broken: dict[int, ImageError]


def unsupported(encoder: Encoder, parts: Collection[frozenset[str]]) -> str | None:
    """Return why a model cannot embed items of these ``Item.parts``; None if it can."""
    for kind in sorted(parts, key=sorted):
        if not encoder.model.supports(MODALITIES[kind]):
            return f"{encoder.name} does not embed {' and '.join(sorted(kind))}{' together' * (len(kind) > 1)}"
    return None


def embed_items(
    encoder: Encoder,
    items: Sequence[Item],
    role: Role,
    batch_tokens: int = BATCH_TOKENS,
    *,
    leave_out_broken: bool = False,
    progress: str | None = None,
) -> Embedded:
    """Embed items with the model's query prompt or document prompt, each image read when its batch is made.

    :param batch_tokens: The most tokens of a batch, by ``estimated_tokens``; an item with more goes alone.
    :param leave_out_broken: Go on where an image cannot be used, and tell which.
    :param progress: What to call the work in a progress bar; None for no bar.
    :raises ImageError: If an image cannot be used and is not left out.
    :raises CocoaError: If the model refuses an item or an embedding is not finite; the message says which item.
    """
    vectors = np.zeros((len(items), encoder.dimension), dtype=np.float32)
    broken: dict[int, ImageError] = {}

    def leave_out(index: int, error: ImageError) -> None:
        if not leave_out_broken:
            raise error
        broken[index] = error

    with tqdm(total=len(items), desc=progress, disable=progress is None, leave=False) as bar:
        for indices, loaded in batches(_loaded(items, leave_out), batch_tokens):
            vectors[indices] = _embed_batch(encoder, [items[index] for index in indices], loaded, role)
            bar.update(len(indices))
    return Embedded(vectors, broken)


def _loaded(items: Sequence[Item], leave_out: Callable[[int, ImageError], None]) -> Iterator[tuple[int, ModelInput]]:
    """Yield items as a model takes them, those of one kind and of like length together."""
    order = sorted(range(len(items)), key=lambda index: (sorted(items[index].parts), -len(items[index].text or "")))
    workers = max(1, available_cores() - 1)
    for index, loading in read_ahead(lambda index: items[index].load(), order, workers=workers, ahead=IMAGES_AHEAD):
        try:
            loaded = loading.result()
        except ImageError as error:
            leave_out(index, error)
        else:
            yield index, loaded


def batches(
    loaded: Iterator[tuple[int, ModelInput]], batch_tokens: int
) -> Iterator[tuple[list[int], list[ModelInput]]]:
    """Yield items with their numbers in batches of one kind, of at most ``batch_tokens`` or of one item."""
    indices: list[int] = []
    batch: list[ModelInput] = []
    tokens = 0
    for index, item in loaded:
        needed = estimated_tokens(item)
        is_other = bool(batch) and batch[-1].keys() != item.keys()
        if batch and (is_other or tokens + needed > batch_tokens or len(batch) == MAX_BATCH_ITEMS):
            yield indices, batch
            indices, batch, tokens = [], [], 0
        indices.append(index)
        batch.append(item)
        tokens += needed
    if batch:
        yield indices, batch


def estimated_tokens(item: ModelInput) -> int:
    """Return about how many tokens a model makes of an item: one for 28 x 28 pixels and one for three bytes of text."""
    tokens = 0
    for part in item.values():
        if isinstance(part, Image.Image):
            tokens += -(-part.width * part.height // PIXELS_A_TOKEN)
        else:
            tokens += -(-len(part.encode()) // 3)
    return tokens


def _embed_batch(encoder: Encoder, items: Sequence[Item], loaded: list[ModelInput], role: Role) -> np.ndarray:
    """Embed one batch; where the model refuses it, find out which item it is.

    :raises CocoaError: If the model refuses an item, has too little memory, or makes of it what is not finite.
    """
    import torch

    embed = encoder.embed_queries if role == "query" else encoder.embed_documents
    try:
        vectors = embed(loaded, batch_size=len(loaded))
    except torch.OutOfMemoryError as error:
        raise CocoaError(
            f"there is too little memory for {len(loaded)} at once, {items[0]} among them ({one_line(error)});"
            " give a smaller --batch-tokens"
        ) from error
    except (CocoaError, ValueError) as error:
        if len(loaded) == 1:
            raise CocoaError(f"{encoder.name} cannot embed {items[0]} ({one_line(error)})") from error
        return np.concatenate(
            [_embed_batch(encoder, [item], [alone], role) for item, alone in zip(items, loaded, strict=True)]
        )
    for item, vector in zip(items, vectors, strict=True):
        if not np.isfinite(vector).all():
            raise CocoaError(f"{encoder.name} makes of {item} an embedding that is not finite; the model is broken")
    return vectors
