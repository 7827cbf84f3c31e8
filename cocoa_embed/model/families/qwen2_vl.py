"""Qwen2-VL, on which the other Qwen families build."""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from cocoa_embed.model.families.family import MAX_ASPECT_RATIO, Family, PartNames, PatchGeometry, Seen
from cocoa_embed.model.host_tensor import on_host
from cocoa_embed.model.template import QWEN
from cocoa_embed.model.visual_tokens import visual_tokens

TAKES_PREPARED_VISION = find_spec("transformers.vision_utils") is not None
"""Without it, transformers computes the vision encoder's positions itself, and waits for the device."""


class Qwen2VL(Family):
    """Images of any size, positions in three dimensions, and attention over the whole image."""

    model_class = Qwen2VLForConditionalGeneration
    processor_class = Qwen2VLProcessor
    markers = QWEN
    adapted = frozenset({"qkv", "fc1", "fc2"})
    packs_attention = True
    parts = PartNames("visual", "blocks", "attn", "attn.proj", "patch_embed.proj.weight")
    replaces_grids: ClassVar[str] = "position_ids"
    """The prepared input in whose absence the encoder needs the grids on its device."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        kind: Any = MODEL_MAPPING[type(config)]
        # A model without weights, for the functions of its class that need only the config.
        self._model: Any = kind.__new__(kind)
        nn.Module.__init__(self._model)
        self._model.config = config

    @property
    def geometry(self) -> PatchGeometry:
        """The geometry in the vision encoder's config."""
        vision = self.config.vision_config
        return PatchGeometry(
            vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
        )

    @classmethod
    def image_geometry(cls, processor: ProcessorMixin) -> PatchGeometry:
        """Return the geometry in the image processor's settings."""
        images = processor.image_processor
        return PatchGeometry(len(images.image_mean), images.temporal_patch_size, images.patch_size, images.merge_size)

    @classmethod
    def limit_pixels(cls, processor: ProcessorMixin, pixels: int | None) -> None:
        """Set the limit, which the processor calls ``longest_edge`` although it counts pixels.

        Small images are not enlarged beyond it.
        """
        if pixels is not None:
            size = processor.image_processor.size
            size["longest_edge"], size["shortest_edge"] = pixels, min(size["shortest_edge"], pixels)

    @classmethod
    def most_pixels(cls, processor: ProcessorMixin) -> int:
        """Return the limit; very thin images can exceed it."""
        return int(processor.image_processor.size["longest_edge"])

    @classmethod
    def most_visual_tokens(cls, processor: ProcessorMixin) -> int:
        """Return the tokens of a square image or, if these are more, of an image of one row."""
        geometry = cls.image_geometry(processor)
        tokens = cls.most_pixels(processor) // (geometry.patch_size * geometry.merge_size) ** 2
        # The shorter side of a long image is rounded up to one token.
        return max(tokens, math.isqrt(MAX_ASPECT_RATIO * tokens))

    @classmethod
    def visual_tokens(cls, processor: ProcessorMixin, width: int, height: int) -> int:
        """Return the image processor's own count."""
        return visual_tokens(processor.image_processor, width, height)

    @classmethod
    def patches(cls, processor: ProcessorMixin, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Return the first frame of the processor's own output, before its last step."""
        done = processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        geometry = cls.image_geometry(processor)
        frames = done["pixel_values"].unflatten(1, (geometry.channels, geometry.temporal_patch_size, -1))
        return frames[:, :, 0].flatten(1), done["image_grid_thw"]

    def position_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the frame, row and column of each token: int64 ``[3, B, L]``."""
        ids = batch["input_ids"]
        if "image_grid_thw" not in batch:
            return torch.arange(ids.shape[1]).expand(3, *ids.shape)
        given = {name: batch[name] for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
        positions, _ = self._model.get_rope_index(ids, **given)
        return positions  # type: ignore[no-any-return]

    def image_inputs(self, grids: Tensor) -> dict[str, Any]:
        """Return positions (``[patches, 2]``), and the boundaries of images (int32 ``[images + 1]``)."""
        if not TAKES_PREPARED_VISION:
            return {"image_grid_thw": on_host(grids)}
        return {f"image_{name}": value for name, value in self.prepared(grids).items()}

    def prepared(self, grids: Tensor) -> dict[str, Any]:
        """Return the inputs that the vision encoder derives from grids, under its own names."""
        from transformers import vision_utils as made

        boundaries = made.get_vision_cu_seqlens(grids)
        return {
            "grid_thw": on_host(grids),
            "position_ids": made.get_vision_position_ids(grids, self.geometry.merge_size),
            "cu_seqlens": on_host(boundaries),
            "max_seqlen": int(boundaries.diff().max()),
        }

    def run_vision(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Seen:
        """Run the encoder, including its merger."""
        visual: Any = self.encoder(model)
        given = {name.removeprefix("image_"): value for name, value in batch.items() if name.startswith("image_")}
        if self.replaces_grids not in given:
            given["grid_thw"] = given["grid_thw"].on(model.device)
        outputs = visual(batch["pixel_values"].to(visual.dtype), **given)
        return Seen(outputs.pooler_output, tuple(outputs.get("deepstack_features") or ()))
