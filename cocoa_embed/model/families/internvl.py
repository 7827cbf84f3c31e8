"""InternVL3: a square of four patches becomes one visual token; the language model is an ordinary Qwen2."""

from collections.abc import Mapping
from typing import Any

from transformers import InternVLForConditionalGeneration, InternVLProcessor, PreTrainedModel, ProcessorMixin

from cocoa_embed.model.families.family import PartNames, PatchGeometry, Seen
from cocoa_embed.model.families.squares import Squares
from cocoa_embed.model.template import Markers


class InternVL(Squares):
    """Images of 448 x 448 pixels and 256 visual tokens."""

    model_class = InternVLForConditionalGeneration
    processor_class = InternVLProcessor
    tokens_key = "image_seq_length"
    markers = Markers("<IMG_CONTEXT>", "<IMG_CONTEXT>", "<img>", "</img>")
    parts = PartNames(
        "vision_tower",
        "encoder.layer",
        "attention",
        "attention.projection_layer",
        "embeddings.patch_embeddings.projection.weight",
        depth="num_hidden_layers",
        merger="multi_modal_projector",
    )

    @property
    def patches_per_row(self) -> int:
        """4, for ``downsample_ratio`` 0.5."""
        return round(1 / self.config.downsample_ratio) ** 2

    @property
    def geometry(self) -> PatchGeometry:
        """The pixels of a visual token count as one patch."""
        vision = self.config.vision_config
        return PatchGeometry(vision.num_channels, 1, round(vision.patch_size[0] / self.config.downsample_ratio), 1)

    @classmethod
    def side(cls, processor: ProcessorMixin) -> int:
        """Return the side of a tile."""
        return int(processor.image_processor.size["height"])

    @classmethod
    def set_side(cls, processor: ProcessorMixin, side: int) -> None:
        """Make an image one tile; the processor cuts images into tiles even if its image processor would not."""
        images: Any = processor.image_processor
        images.min_patches = images.max_patches = 1
        images.size["height"] = images.size["width"] = side

    def run_vision(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Seen:
        """Run the encoder on whole images, as the stock class does."""
        base: Any = model.base_model
        images = self.images(batch["pixel_values"], batch["image_grid_thw"])
        return Seen(base.get_image_features(images, return_dict=True).pooler_output.flatten(0, 1))
