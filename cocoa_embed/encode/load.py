"""Load an encoder from an exported model, a checkpoint of any stage, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocoa_embed.errors import CocoaError, UsageError, printable
from cocoa_embed.model import loading

if TYPE_CHECKING:
    from cocoa_embed.encode.encoder import Encoder


def load_encoder(model: str | Path, device: str | None = None, dimension: int | None = None, **options: Any) -> Encoder:
    """Load an exported model, a checkpoint of any stage, or a model of the Hugging Face hub, as ``load_model`` does.

    :param device: The torch device; None takes the fastest.
    :param dimension: Truncate every embedding to this many dimensions.
    :param options: ``dtype``, ``revision``, ``trust_remote_code``, ``cache_folder`` and ``model_kwargs`` of
        ``load_model``, ``workers`` and ``batch_tokens`` of ``Encoder``, and ``max_pixels``, to which larger images are
        scaled down instead of the model's own limit.
    :raises CocoaError: If the model cannot be loaded. A folder that is missing or broken is refused before any heavy
        library is imported.
    :raises UsageError: If the model does not support ``max_pixels``, or not this value.
    """
    streaming = {name: options.pop(name) for name in ("workers", "batch_tokens") if name in options}
    pixels = options.pop("max_pixels", None)
    loaded = loading.load_model(model, device, **options)
    if pixels is not None:
        from cocoa_embed.model.backbone import limit_images
        from cocoa_embed.model.families.registry import FAMILIES, family_of_images

        try:
            family_of_images(loaded.processor)
        except (AttributeError, UsageError) as error:  # a text-only model may have no processor
            families = ", ".join(sorted(FAMILIES))
            raise UsageError(
                f"max_pixels works only for models of {families}, not for {printable(model)}; leave max_pixels out"
                " (--max-pixels)"
            ) from error
        limit_images(loaded.processor, pixels)
    from cocoa_embed.encode.encoder import Encoder

    return Encoder(loaded, printable(model), dimension, **streaming)


def require_findable(name: str, owner: str) -> str:
    """Return the name of a model, if another process can load it by that name.

    :param owner: What holds the loaded model, for the error.
    :raises CocoaError: If it is neither a folder nor a hub name.
    """
    if not (Path(name).expanduser().is_dir() or loading.is_hub_name(name)):
        raise CocoaError(
            f"{owner} cannot be sent to another process, which would find no model {name!r}; name the loaded model"
            " after the folder or the hub model that it was loaded from"
        )
    return name
