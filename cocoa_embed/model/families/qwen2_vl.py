"""Qwen2-VL, on which the other Qwen families build."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from cocoa_embed.model.families.family import Family, PartNames, PatchGeometry
from cocoa_embed.model.host_tensor import on_host

TAKES_PREPARED_VISION = find_spec("transformers.vision_utils") is not None
"""Older versions of transformers make the vision encoder's positions themselves, and wait for the device."""


class Qwen2VL(Family):
    """Images of any size, positions in three dimensions, and attention over the whole image."""

    model_class = Qwen2VLForConditionalGeneration
    processor_class = Qwen2VLProcessor
    parts = PartNames("visual", "blocks", "attn", "attn.proj", "patch_embed.proj.weight")

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        kind: Any = MODEL_MAPPING[type(config)]
        # The class's own functions, of a model without weights: they take nothing but the config.
        self._model: Any = kind.__new__(kind)
        nn.Module.__init__(self._model)
        self._model.config = config

    @property
    def geometry(self) -> PatchGeometry:
        """As the vision encoder's config says."""
        vision = self.config.vision_config
        return PatchGeometry(
            vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
        )

    def position_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return frames, rows and columns: int64 ``[3, B, L]``."""
        kinds, grids = batch["mm_token_type_ids"], batch["image_grid_thw"]
        positions, _ = self._model.get_rope_index(
            batch["input_ids"],
            mm_token_type_ids=kinds,
            image_grid_thw=grids,
            attention_mask=batch["attention_mask"],
        )
        return positions  # type: ignore[no-any-return]

    def text_position_ids(self, rows: int, length: int) -> Tensor:
        """Return the same place in all three dimensions: int64 ``[3, B, L]``."""
        return torch.arange(length).expand(3, rows, length)

    def image_inputs(self, grids: Tensor) -> dict[str, Any]:
        """Return positions (``[patches, 2]``), and where images begin and the last ends (int32 ``[images + 1]``)."""
        if not TAKES_PREPARED_VISION:
            return {"image_grid_thw": on_host(grids)}
        return {f"image_{name}": value for name, value in self.prepared(grids).items()}

    def prepared(self, grids: Tensor) -> dict[str, Any]:
        """Return what the vision encoder takes of grids, by its own names."""
        from transformers import vision_utils as made

        boundaries = made.get_vision_cu_seqlens(grids)
        return {
            "grid_thw": on_host(grids),
            "position_ids": made.get_vision_position_ids(grids, self.geometry.merge_size),
            "cu_seqlens": on_host(boundaries),
            "max_seqlen": int(boundaries.diff().max()),
        }

    def run_vision(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """Run the encoder, which ends in its merger."""
        visual = self.encoder(model)
        given = {name.removeprefix("image_"): value for name, value in batch.items() if name.startswith("image_")}
        if self.reads_grids(given):
            given["grid_thw"] = given["grid_thw"].on(model.device)
        return visual(batch["pixel_values"].to(visual.dtype), **given)

    def reads_grids(self, given: Mapping[str, Any]) -> bool:
        """Return whether the encoder computes with the grids, on its device, as nothing is prepared of them."""
        return not TAKES_PREPARED_VISION
