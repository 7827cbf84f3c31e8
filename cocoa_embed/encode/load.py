"""Load an encoder from an exported model, a checkpoint of any stage, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocoa_embed.errors import printable
from cocoa_embed.model import loading

if TYPE_CHECKING:
    from cocoa_embed.encode.encoder import Encoder


def load_encoder(model: str | Path, device: str | None = None, dimension: int | None = None, **options: Any) -> Encoder:
    """Load an exported model, a checkpoint of any stage, or a model of the Hugging Face hub, as ``load_model`` does.

    :param device: The torch device; None takes the fastest.
    :param dimension: Truncate every embedding to this many dimensions.
    :param options: ``dtype``, ``revision`` and ``trust_remote_code`` of ``load_model``, ``workers`` and
        ``batch_tokens`` of ``Encoder``.
    :raises CocoaError: If the model cannot be loaded. A folder that is missing or broken is refused before any heavy
        library is imported.
    """
    streaming = {name: options.pop(name) for name in ("workers", "batch_tokens") if name in options}
    loaded = loading.load_model(model, device, **options)
    from cocoa_embed.encode.encoder import Encoder

    return Encoder(loaded, printable(model), dimension, **streaming)
