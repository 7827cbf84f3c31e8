"""Items as inputs of a SentenceTransformer, with images that are uint8 until the model runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Item
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.train.data.image_patches import normalised
from cocoa_embed.train.stages.rendering import render_patches


def preprocess_items(model: SentenceTransformer, items: Sequence[Item], **kwargs: Any) -> dict[str, Any]:
    """Return items as inputs of a model that ``normalise_patches`` runs before: as its own ``preprocess`` makes them.

    With images, there are ``image_digests``, too.


    :param kwargs: ``prompt``, and others that make no difference here.
    :raises CocoaError: If an image cannot be used, or the images of an item do not fit into a sequence.
    """
    module: Any = model[0]
    batch: dict[str, Any] = render_patches(module.processor, items, prompt=kwargs.get("prompt") or "")
    if "pixel_values" in batch:
        batch["num_images_per_sample"] = torch.tensor([len(item.images) for item in items])
    return {**batch, "modality": "message"}


def worst_column(model: SentenceTransformer, max_length: int, *, with_image: bool) -> dict[str, Any]:
    """Return the largest image, or the longest text, as a column of one item, without ``image_digests``."""
    if not with_image:
        return preprocess_items(model, [Item(text="word " * max_length)])
    module: Any = model[0]
    side = math.isqrt(family_of_images(module.processor).most_pixels(module.processor))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "largest.png"
        Image.new("RGB", (side, side)).save(path)
        column = preprocess_items(model, [Item(images=(path,))])
    del column["image_digests"]  # the vision encoder is to run
    return column


def normalise_patches(
    processor: ProcessorMixin, module: nn.Module, args: tuple[dict[str, Any]]
) -> tuple[dict[str, Any]]:
    """Turn uint8 patches into pixel values on their device, as a forward pre-hook of a model's first module.

    :param processor: That made them.
    """
    patches = args[0].get("pixel_values")
    if patches is None or patches.dtype != torch.uint8:
        return args
    return ({**args[0], "pixel_values": normalised(patches, processor)},)
