"""Turn items into inputs of a SentenceTransformer: images are uint8 until the model runs; integers stay on the host."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Item
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.model.forward_inputs import forward_inputs, with_host_inputs
from cocoa_embed.model.host_tensor import on_host
from cocoa_embed.train.data.image_patches import normalised
from cocoa_embed.train.stages.reconstruction import bridge_model_mask, full_model_mask
from cocoa_embed.train.stages.rendering import render_patches

MODEL_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "image_grid_thw", "mm_token_type_ids")


def preprocess_items(model: SentenceTransformer, items: Sequence[Item], **kwargs: Any) -> dict[str, Any]:
    """Return items as the inputs that a model's own ``preprocess`` makes of them.

    The patches of images are uint8, for ``normalise_patches``, and ``image_digests`` are added.

    :param kwargs: ``prompt``; others are ignored.
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
    del column["image_digests"]  # the vision encoder has to run
    return column


def keep_on_host(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose int64 tensors stay on the CPU.

    A cached loss reads them there to cut the batch, and ``prepare_forward`` reads them to complete its parts.
    """
    return {
        name: on_host(value) if isinstance(value, Tensor) and value.dtype == torch.int64 else value
        for name, value in batch.items()
    }


def normalise_patches(
    processor: ProcessorMixin, module: nn.Module, args: tuple[dict[str, Any]]
) -> tuple[dict[str, Any]]:
    """Turn uint8 patches into pixel values on their device, as a forward pre-hook of a model's first module.

    :param processor: The processor that made them.
    """
    patches = args[0].get("pixel_values")
    if patches is None or patches.dtype != torch.uint8:
        return args
    return ({**args[0], "pixel_values": normalised(patches, processor)},)


def prepare_forward(
    module: nn.Module, args: tuple[dict[str, Any]], kwargs: dict[str, Any]
) -> tuple[tuple[dict[str, Any]], dict[str, Any]]:
    """Give a model all that it would otherwise read back from its device, as a forward pre-hook of its first module.

    It takes any features, and does not wait for those of ``keep_on_host``. The model gets the mask that it would make
    itself: none for a batch without padding. A batch with ``blocks`` runs under the bridge mask, where ``<EOS>`` does
    not attend to block B.
    """
    model: Any = module.auto_model
    is_padded = not args[0]["attention_mask"].cpu().all()
    batch = with_host_inputs(model, args[0])
    mask = full_model_mask(model, batch["attention_mask"]) if is_padded else None
    if "blocks" in batch:
        mask = bridge_model_mask(model, batch["blocks"].to(model.device), eos_attends_to_b=False)
    inputs = dict.fromkeys(MODEL_INPUTS) | forward_inputs(model, batch)
    features = {**args[0], "attention_mask": batch["attention_mask"]}
    return (features,), {**kwargs, **inputs, "attention_mask": mask, "use_cache": False}
