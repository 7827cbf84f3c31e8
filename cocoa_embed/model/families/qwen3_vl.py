"""Qwen3-VL: features of several vision layers enter the language model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from cocoa_embed.model.families.qwen2_vl import Qwen2VL
from cocoa_embed.model.host_tensor import places

PREPARES_INTERPOLATION = "get_vision_interpolation_indices_and_weights"
"""Prepares the interpolation of vision positions; versions of transformers without it wait for the device."""


class Qwen3VL(Qwen2VL):
    """Learned vision positions are interpolated; the first layers of the language model take features, too."""

    model_class = Qwen3VLForConditionalGeneration
    processor_class = Qwen3VLProcessor
    adapted = frozenset({"qkv", "linear_fc1", "linear_fc2"})
    replaces_grids = "interp_indices"

    def prepared(self, grids: Tensor) -> dict[str, Any]:
        """Add the four learned positions of each patch, and the weight of each: ``[patches, 4]``."""
        from transformers import vision_utils as made

        found = super().prepared(grids)
        if hasattr(made, PREPARES_INTERPOLATION):
            found["interp_indices"], found["interp_weights"] = made.get_vision_interpolation_indices_and_weights(
                grids,
                num_grid_per_side=int(self.config.vision_config.num_position_embeddings**0.5),
                align_corners=True,
                spatial_merge_size=self.geometry.merge_size,
            )
        return found

    def feed_inner_layers(self, model: PreTrainedModel, is_visual: Tensor, features: Sequence[Tensor]) -> None:
        """Add the features where the stock class adds them."""
        language_model: Any = model.get_decoder()

        def feed(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
            hook.remove()
            return args, {**kwargs, "visual_pos_masks": is_visual, "deepstack_visual_embeds": features}

        hook = language_model.register_forward_pre_hook(feed, with_kwargs=True)
        language_model._deepstack_process = _add_features  # the class's own waits for the device

    def fewest_layers(self) -> int:
        """Return the number of layers that take features."""
        return max(1, len(self.config.vision_config.deepstack_visual_indexes))

    def with_layers(self, layers: Mapping[str, int]) -> PreTrainedConfig:
        """Take features from the first vision layers."""
        config: Any = super().with_layers(layers)
        config.vision_config.deepstack_visual_indexes = [*range(len(config.vision_config.deepstack_visual_indexes))]
        return config  # type: ignore[no-any-return]


def _add_features(hidden_states: Tensor, is_visual: Tensor, features: Tensor) -> Tensor:
    where = places(is_visual, len(features))
    return hidden_states.flatten(0, 1).index_add(0, where, features.to(hidden_states.dtype)).view_as(hidden_states)
