"""Qwen2.5-VL: most vision layers attend in windows."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from cocoa_embed.model.families.qwen2_vl import Qwen2VL
from cocoa_embed.model.host_tensor import on_host


class Qwen25VL(Qwen2VL):
    """Vision layers in ``fullatt_block_indexes`` attend to the whole image, others in windows."""

    model_class = Qwen2_5_VLForConditionalGeneration
    processor_class = Qwen2_5_VLProcessor
    adapted = frozenset({"qkv", "gate_proj", "up_proj", "down_proj"})

    def prepared(self, grids: Tensor) -> dict[str, Any]:
        """Add the boundaries of windows, and the order of visual tokens in them."""
        from transformers import vision_utils as made

        vision = self.config.vision_config
        index, boundaries = made.get_vision_window_index(
            grids, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        return {
            **super().prepared(grids),
            "window_index": index,
            "cu_window_seqlens": on_host(boundaries),
            "max_window_seqlen": int(boundaries.diff().max()),
        }

    @property
    def attention_window(self) -> int:
        """The side of the windows, a multiple of a visual token's side."""
        merge, patch = self.geometry.merge_size, self.geometry.patch_size
        return int(self.config.vision_config.window_size) // merge // patch * merge

    def layers(self) -> dict[str, int]:
        """Count layers with windows as ``vision``."""
        full = len(self.config.vision_config.fullatt_block_indexes)
        return {**super().layers(), "vision": self.config.vision_config.depth - full, "full": full}

    def with_layers(self, layers: Mapping[str, int]) -> PreTrainedConfig:
        """Put the layers that attend to the whole image last."""
        config: Any = super().with_layers(layers)
        vision = config.vision_config
        vision.depth += layers["full"]
        vision.fullatt_block_indexes = list(range(layers["vision"], vision.depth))
        return config  # type: ignore[no-any-return]
