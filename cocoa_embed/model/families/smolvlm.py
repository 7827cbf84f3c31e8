"""SmolVLM (256M and 500M), in the stock class Idefics3: the patches of an image are shuffled into few tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedModel,
    ProcessorMixin,
    SmolVLMForConditionalGeneration,
)

from cocoa_embed.model.families.family import PartNames, PatchGeometry, Seen
from cocoa_embed.model.families.squares import Squares
from cocoa_embed.model.template import Markers


class SmolVLM(Squares):
    """Images of 512 x 512 pixels and 64 visual tokens."""

    model_class = Idefics3ForConditionalGeneration
    processor_class = Idefics3Processor
    tokens_key = "image_seq_len"
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

    @property
    def patches_per_row(self) -> int:
        """The square of ``scale_factor``."""
        return int(self.config.scale_factor) ** 2

    @property
    def geometry(self) -> PatchGeometry:
        """The pixels of a visual token count as one patch."""
        vision = self.config.vision_config
        return PatchGeometry(vision.num_channels, 1, vision.patch_size * self.config.scale_factor, 1)

    @classmethod
    def side(cls, processor: ProcessorMixin) -> int:
        """Return the side of an image that is not split."""
        return int(processor.image_processor.max_image_size["longest_edge"])

    @classmethod
    def set_side(cls, processor: ProcessorMixin, side: int) -> None:
        """Make an image one square: turn splitting off."""
        images: Any = processor.image_processor
        images.do_image_splitting = False
        images.size["longest_edge"] = images.max_image_size["longest_edge"] = side

    def run_vision(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Seen:
        """Run the encoder on whole images, module by module: its own forward pass would read from the device."""
        encoder: Any = self.encoder(model)
        base: Any = model.base_model
        images = self.images(batch["pixel_values"].to(encoder.dtype), batch["image_grid_thw"])
        height, width = (side // self.config.vision_config.patch_size for side in images.shape[2:])
        exists = torch.ones(len(images), height, width, dtype=torch.bool, device=images.device)
        embedded = encoder.embeddings(pixel_values=images, patch_attention_mask=exists)
        states = encoder.encoder(inputs_embeds=embedded).last_hidden_state
        return Seen(base.connector(encoder.post_layernorm(states)).flatten(0, 1))


class SmolVLM2(SmolVLM):
    """The same model under another name; its own processor, which requires ``num2words``, is not needed for images."""

    model_class = SmolVLMForConditionalGeneration
