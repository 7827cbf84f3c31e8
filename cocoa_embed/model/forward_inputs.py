"""The inputs of a forward pass, computed on the CPU where it would otherwise read values back from its device."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.host_tensor import HostTensor, on_host, places

REMEMBERED = "remembered_vision"
"""The attribute of a base model with a function that replaces ``Family.run_vision`` for a batch of ``HostInputs``."""


class HostInputs:
    """Adds to a batch what the model would compute from its values: positions, lengths of sequences, and windows.

    :param config: The config of a supported backbone.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.family = family_of(config)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with inputs that a forward pass would otherwise compute.

        :param batch: Right-padded ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (int64 ``[B, L]``) and,
            where there are images, ``image_grid_thw`` (int64 ``[images, 3]``).
        :returns: The batch with ``position_ids`` and, if there are images, the family's ``image_inputs``;
            ``image_grid_thw`` stays on the CPU.
        :raises ValueError: If the number of visual tokens is not that of the images.
        """
        batch = {name: on_host(each.cpu()) if name.startswith("image_") else each for name, each in batch.items()}
        if "image_grid_thw" not in batch:
            return {**batch, "position_ids": self.family.position_ids(batch)}
        read = {
            name: batch[name].cpu() for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        }
        found, grids = int((read["mm_token_type_ids"] == 1).sum()), read["image_grid_thw"]
        expected = int(grids.prod(dim=1).sum()) // self.family.geometry.patches_per_token
        if found != expected:
            raise ValueError(f"the batch has {found} visual tokens, but its images have {expected}")
        return {**batch, "position_ids": self.family.position_ids(read), **self.family.image_inputs(grids)}

    def after(self, collate: Callable[[Any], Mapping[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """Return a collator that adds these inputs to the batches of ``collate``."""
        return partial(_collate, self, collate)


def _collate(
    prepare: HostInputs,
    collate: Callable[[Any], Mapping[str, Any]],
    examples: Any,  # noqa: ANN401
) -> dict[str, Any]:
    return prepare(collate(examples))


def with_host_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with what ``HostInputs`` adds, on the model's device; if that is missing, read the batch back."""
    return on_device(model, batch if "position_ids" in batch else HostInputs(model.config)(batch))


def on_device(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch of ``HostInputs`` with the tensors that the model computes with copied to its device."""
    return {name: _on(value, model.device) if name in _ON_DEVICE else value for name, value in batch.items()}


def forward_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``model.base_model`` for a batch, except its mask, without a device read.

    Images are embedded in place of their tokens, as in the stock class, which has to ask the device how many tokens
    these are.

    :param batch: From ``HostInputs``.
    """
    base: Any = model.base_model
    batch = with_host_inputs(model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if "pixel_values" not in batch:
        return inputs
    family, frozen = family_of(model.config), vars(base).get(REMEMBERED)
    features, of_layers = family.run_vision(model, batch) if frozen is None else frozen(batch)
    embedded = base.get_input_embeddings()(inputs.pop("input_ids"))
    is_visual = batch["mm_token_type_ids"] == 1
    merged = embedded.flatten(0, 1).index_copy(0, places(is_visual, len(features)), features.to(embedded.dtype))
    if of_layers:
        family.feed_inner_layers(model, is_visual, of_layers)
    return inputs | {"inputs_embeds": merged.view_as(embedded)}


_ON_DEVICE = frozenset(
    {
        *("input_ids", "attention_mask", "mm_token_type_ids", "position_ids"),
        *("image_position_ids", "image_window_index", "image_interp_indices", "image_interp_weights"),
    }
)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.on(device) if isinstance(tensor, HostTensor) else tensor.to(device, non_blocking=True)
