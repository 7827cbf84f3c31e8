"""SmolVLM (256M and 500M), of the stock class Idefics3: each image a square, its patches shuffled into few tokens."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedModel, ProcessorMixin

from cocoa_embed.errors import UsageError
from cocoa_embed.model.families.family import Family, PartNames, PatchGeometry, Seen
from cocoa_embed.model.host_tensor import on_host
from cocoa_embed.model.template import Markers


class SmolVLM(Family):
    """A raw patch is what stands behind a visual token: a square of the encoder's own patches, which it cuts itself."""

    model_class = Idefics3ForConditionalGeneration
    processor_class = Idefics3Processor
    markers = Markers(
        "<image>", "<image>", "<fake_token_around_image><global-img>", "<fake_token_around_image>", around=3
    )
    parts = PartNames(
        "vision_model",
        "encoder.layers",
        "self_attn",
        "self_attn.out_proj",
        "embeddings.patch_embedding.weight",
        depth="num_hidden_layers",
        merger="connector",
    )
    adapted = frozenset({"q_proj", "k_proj", "v_proj", "fc1", "fc2"})

    @property
    def patches_per_row(self) -> int:
        """The square of ``scale_factor``."""
        return int(self.config.scale_factor) ** 2

    @property
    def geometry(self) -> PatchGeometry:
        """A visual token's pixels as one patch."""
        vision = self.config.vision_config
        return PatchGeometry(vision.num_channels, 1, vision.patch_size * self.config.scale_factor, 1)

    @classmethod
    def image_geometry(cls, processor: ProcessorMixin) -> PatchGeometry:
        """Divide the image's side by its tokens; what is left over (384 = 9 * 42 + 6) the encoder does not see."""
        images: Any = processor.image_processor
        side = images.max_image_size["longest_edge"] // math.isqrt(_tokens(processor))
        return PatchGeometry(len(images.image_mean), 1, side, 1)

    @classmethod
    def limit_pixels(cls, processor: ProcessorMixin, pixels: int | None) -> None:
        """Make every image one square of as many visual tokens as fit, and of no more than the processor makes itself.

        :raises UsageError: If a visual token has more pixels.
        """
        side, tokens = cls.image_geometry(processor).patch_size, math.isqrt(_tokens(processor))
        images: Any = processor.image_processor
        images.do_image_splitting = False
        if pixels is not None and (fitting := math.isqrt(pixels) // side) < tokens:
            if fitting == 0:
                raise UsageError(f"max_pixels is {pixels}, but a visual token has {side} x {side}; raise it.")
            images.max_image_size["longest_edge"] = fitting * side
            processor.image_seq_len = fitting**2  # type: ignore[attr-defined]
        images.size["longest_edge"] = images.max_image_size["longest_edge"]

    @classmethod
    def most_pixels(cls, processor: ProcessorMixin) -> int:
        """Return those of every image."""
        return int(processor.image_processor.max_image_size["longest_edge"]) ** 2

    @classmethod
    def most_visual_tokens(cls, processor: ProcessorMixin) -> int:
        """Return those of every image."""
        return _tokens(processor)

    @classmethod
    def visual_tokens(cls, processor: ProcessorMixin, width: int, height: int) -> int:
        """Return as many for any size."""
        return _tokens(processor)

    @classmethod
    def patches(cls, processor: ProcessorMixin, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Cut the processor's own image into the squares behind visual tokens."""
        done = processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        count, size = math.isqrt(_tokens(processor)), cls.image_geometry(processor).patch_size
        pixels = done["pixel_values"][0, 0, :, : count * size, : count * size]
        rows = pixels.unflatten(2, (count, size)).unflatten(1, (count, size)).permute(1, 3, 0, 2, 4)
        return rows.reshape(count**2, -1), torch.tensor([[1, count, count]])

    def position_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the places in the sequence, of text and image alike: int64 ``[B, L]``."""
        ids = batch["input_ids"]
        return torch.arange(ids.shape[1]).expand(ids.shape)

    def image_inputs(self, grids: Tensor) -> dict[str, Any]:
        """Return the grids alone."""
        return {"image_grid_thw": on_host(grids)}

    def images(self, rows: Tensor, grids: Tensor) -> Tensor:
        """Put rows of ``pixel_values`` together: ``[images, channels, height, width]``.

        :param grids: Of images of one size, on the CPU.
        """
        _, height, width = grids[0].tolist()
        size = self.geometry.patch_size
        blocks = rows.view(-1, height, width, self.geometry.channels, size, size)
        return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(blocks), -1, height * size, width * size)

    def run_vision(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Seen:
        """Run the encoder on whole images, part by part: its own forward pass would read from the device."""
        encoder: Any = self.encoder(model)
        base: Any = model.base_model
        images = self.images(batch["pixel_values"].to(encoder.dtype), batch["image_grid_thw"])
        height, width = (side // self.config.vision_config.patch_size for side in images.shape[2:])
        exists = torch.ones(len(images), height, width, dtype=torch.bool, device=images.device)
        embedded = encoder.embeddings(pixel_values=images, patch_attention_mask=exists)
        states = encoder.encoder(inputs_embeds=embedded).last_hidden_state
        return Seen(base.connector(encoder.post_layernorm(states)).flatten(0, 1))


def _tokens(processor: ProcessorMixin) -> int:
    tokens: int = processor.image_seq_len  # type: ignore[attr-defined]
    return tokens
