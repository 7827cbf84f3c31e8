"""Images on their way from a worker to the model: read one at a time, and sent as uint8 patches."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import get_worker_info
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from cocoa_embed.data.rows import Item, ItemImage
from cocoa_embed.train.data.image_check import read_size
from cocoa_embed.train.data.rows import load_row_image
from cocoa_embed.train.stages.rendering import check_room

AS_READ = {"image": {"do_rescale": False, "do_normalize": False}}
"""Options of the processor that leave pixels as they are, uint8."""

COLOURS = 3


def preprocess_items(
    model: SentenceTransformer,
    items: Sequence[Item],
    load: Callable[[ItemImage], Image.Image] = load_row_image,
    **kwargs: Any,
) -> dict[str, Any]:
    """Return items as inputs of the model, by its own ``preprocess``, with their images read.

    :raises CocoaError: If an image cannot be used, or the images of an item do not fit into a sequence.
    """
    module: Any = model[0]
    inputs = [item.load(load) for item in items]
    for item, given in zip(items, inputs, strict=True):
        if len(item.images) > 1:
            check_room(module.processor, item, given["image"])
    return model.preprocess(inputs, **kwargs)


def preprocess_patches(model: SentenceTransformer, items: Sequence[Item], **kwargs: Any) -> dict[str, Any]:
    """Return ``preprocess_items`` with ``pixel_values`` as uint8 patches of one frame each, which may be off by one.

    Images are decoded one after the other and scaled down by Pillow, which takes less memory and time than the
    processor. ``pixel_values`` of 448 x 448 pixels are 4.8 MB, the patches 0.6 MB. ``unpack_patches`` is the way back.
    """
    module: Any = model[0]
    processor, images = module.processor, module.processor.image_processor
    patches, filled, parts = _room_for_patches(items, images), 0, []

    def load(image: ItemImage) -> Image.Image:
        return scaled_down(load_row_image(image), images)

    for some in _one_image_at_a_time(items):
        part = preprocess_items(model, some, load, processing_kwargs=AS_READ, **kwargs)
        if (frames := part.pop("pixel_values", None)) is not None:
            patches[filled : filled + len(frames)] = _first_frame(frames, images)
            filled += len(frames)
        parts.append(part)
    width = max(part["input_ids"].shape[1] for part in parts)
    joined: dict[str, Any] = {"modality": parts[0]["modality"]}
    paddings = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    for name, padding in paddings.items():
        joined[name] = torch.cat([pad(part[name], (0, width - part[name].shape[1]), value=padding) for part in parts])
    if len(patches):
        joined["pixel_values"] = patches
        joined["image_grid_thw"] = torch.cat([part["image_grid_thw"] for part in parts if "image_grid_thw" in part])
        joined["num_images_per_sample"] = torch.tensor([len(item.images) for item in items])
    return joined


def scaled_down(image: Image.Image, processor: Any) -> Image.Image:  # noqa: ANN401
    """Return an image in the size that the processor scales it to, if that is smaller."""
    height, width = smart_resize(
        image.height,
        image.width,
        factor=processor.patch_size * processor.merge_size,
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
    )
    if width * height >= image.width * image.height:
        return image
    return image.resize((width, height), Image.Resampling(processor.resample))


def unpack_patches(processor: Any, module: nn.Module, args: tuple[dict[str, Any]]) -> tuple[dict[str, Any]]:  # noqa: ANN401
    """Turn uint8 patches into pixel values on their device, as a forward pre-hook of a model's first module.

    :param processor: The image processor that made them.
    """
    patches = args[0].get("pixel_values")
    if patches is None or patches.dtype != torch.uint8:
        return args
    images = patches.unflatten(1, (-1, processor.patch_size, processor.patch_size))
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    pixels = processor.rescale_and_normalize(images, True, processor.rescale_factor, True, mean, std)
    frames = pixels[:, :, None].expand(-1, -1, processor.temporal_patch_size, -1, -1)
    return ({**args[0], "pixel_values": frames.flatten(1)},)


def _one_image_at_a_time(items: Sequence[Item]) -> Iterator[list[Item]]:
    for is_pictured, some in groupby(items, lambda item: bool(item.images)):
        together = list(some)
        yield from ([item] for item in together) if is_pictured else [together]


def _room_for_patches(items: Sequence[Item], processor: Any) -> Tensor:  # noqa: ANN401
    """Return an empty tensor for the patches of all images; a worker has it in the memory that it sends, not twice."""
    sizes = [read_size(image) for item in items for image in item.images]
    count = sum(processor.get_number_of_image_patches(height, width, {}) for width, height in sizes)
    room = torch.empty(count, COLOURS * processor.patch_size**2, dtype=torch.uint8)
    return room if get_worker_info() is None else room.share_memory_()


def _first_frame(patches: Tensor, processor: Any) -> Tensor:  # noqa: ANN401
    """Return the first of the equal frames of an image's patches, uint8 ``[patches, channels * size**2]``."""
    frames = patches.unflatten(1, (COLOURS, processor.temporal_patch_size, processor.patch_size**2))
    return frames[:, :, 0].flatten(1)
