"""Embed the items of an evaluation in batches; images are loaded a few batches ahead and then released."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.data.rows import Item
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import CocoaError, one_line
from cocoa_embed.evaluation import BATCH_TOKENS

if TYPE_CHECKING:
    from cocoa_embed.encode.encoder import Encoder, ModelInput

Role = Literal["query", "document"]

MAX_BATCH_ITEMS = 256

IMAGES_AHEAD = 16
"""Images that are decoded while the model embeds others."""

PIXELS_A_TOKEN = 28 * 28
"""The pixels of a visual token of Qwen2-VL."""


def unsupported(encoder: Encoder, parts: Collection[frozenset[str]]) -> str | None:
    """Return why a model cannot embed items of these ``Item.parts``; None if it can."""
    for kind in sorted(map(sorted, parts)):
        modality: Any = tuple(kind) if len(kind) > 1 else kind[0]
        if not encoder.model.supports(modality):
            return f"{encoder.name} does not embed {' and '.join(kind)}{' together' * (len(kind) > 1)}"
    return None


def embed_items(
    encoder: Encoder,
    items: Sequence[Item],
    role: Role,
    batch_tokens: int = BATCH_TOKENS,
    progress: str | None = None,
) -> np.ndarray:
    """Embed items with the model's query prompt or document prompt; images are loaded when their batch is made.

    :param batch_tokens: The maximum ``estimated_tokens`` of a batch; a larger item is embedded alone.
    :param progress: The label of a progress bar; None for no bar.
    :returns: float32 ``[items, dimension]``; ``[items, vectors, dimension]`` for a model of several vectors.
    :raises ImageError: If an image cannot be used.
    :raises CocoaError: If the model refuses an item or an embedding is not finite; the message names the item.
    """
    encoder = encoder.truncate(encoder.dimension, encoder.most_vectors)
    vectors = np.zeros((len(items), *encoder.shape), dtype=np.float32)
    # Items of one kind and of similar lengths share batches.
    order = sorted(range(len(items)), key=lambda index: (sorted(items[index].parts), -len(items[index].text or "")))
    workers = max(1, available_cores() - 1)
    loading = read_ahead(lambda index: items[index].load(), order, workers=workers, ahead=IMAGES_AHEAD)
    with tqdm(total=len(items), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in batches(((index, item.result()) for index, item in loading), batch_tokens):
            indices = [index for index, _ in batch]
            vectors[indices] = _embed_batch(encoder, [(items[index], item) for index, item in batch], role)
            bar.update(len(batch))
    return vectors


def batches(loaded: Iterable[tuple[int, ModelInput]], batch_tokens: int) -> Iterator[list[tuple[int, ModelInput]]]:
    """Yield numbered items in batches of one kind, of at most ``batch_tokens`` or of one item."""
    batch: list[tuple[int, ModelInput]] = []
    tokens = 0
    for index, item in loaded:
        needed = estimated_tokens(item)
        is_other = bool(batch) and batch[-1][1].keys() != item.keys()
        if batch and (is_other or tokens + needed > batch_tokens or len(batch) == MAX_BATCH_ITEMS):
            yield batch
            batch, tokens = [], 0
        batch.append((index, item))
        tokens += needed
    if batch:
        yield batch


def estimated_tokens(item: ModelInput) -> int:
    """Return roughly how many tokens an item becomes: one per 28 x 28 pixels and one per three bytes of text.

    Unlike ``token_counter`` it also bounds the memory of decoded images, for models that scale every image to one size.
    """
    return sum(
        -(-part.width * part.height // PIXELS_A_TOKEN) if isinstance(part, Image.Image) else -(-len(part.encode()) // 3)
        for part in item.values()
    )


def _embed_batch(encoder: Encoder, batch: Sequence[tuple[Item, ModelInput]], role: Role) -> np.ndarray:
    """Embed one batch; if the model refuses it, find the item that it refuses.

    :raises CocoaError: If the model refuses an item, runs out of memory, or an embedding is not finite.
    """
    import torch

    embed = encoder.embed_queries if role == "query" else encoder.embed_documents
    first = batch[0][0]
    try:
        vectors = embed([loaded for _, loaded in batch], batch_size=len(batch))
    except torch.OutOfMemoryError as error:
        raise CocoaError(
            f"{len(batch)} items at once, including {first}, do not fit into memory ({one_line(error)});"
            " give a smaller --batch-tokens"
        ) from error
    except (CocoaError, ValueError) as error:
        if len(batch) == 1:
            raise CocoaError(f"{encoder.name} cannot embed {first} ({one_line(error)})") from error
        return np.concatenate([_embed_batch(encoder, [each], role) for each in batch])
    for (item, _), vector in zip(batch, vectors, strict=True):
        if not np.isfinite(vector).all():
            raise CocoaError(f"{encoder.name} embeds {item} as a vector that is not finite; the model is broken")
    return vectors
