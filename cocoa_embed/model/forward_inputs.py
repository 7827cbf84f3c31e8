"""The inputs of a forward pass, made on the CPU where it would otherwise read values back from its device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

TAKES_PREPARED_VISION = find_spec("transformers.vision_utils") is not None
"""Older versions of transformers make the vision encoder's positions themselves, and wait for the device."""

PREPARES_INTERPOLATION = "get_vision_interpolation_indices_and_weights"
"""Of Qwen3-VL's table of positions; versions of transformers without it wait for the device."""


class HostTensor(Tensor):
    """A tensor that stays in the CPU's memory when its batch goes to a device, so that reading it waits for nothing."""

    def to(self, *args: Any, **kwargs: Any) -> "HostTensor":  # type: ignore[override]
        """Return the tensor itself; ``on`` copies it."""
        return self

    def on(self, device: torch.device) -> Tensor:
        """Return an ordinary copy on a device, without waiting for it; the same one each time."""
        copies: dict[torch.device, Tensor] = vars(self).setdefault("copies", {})
        if device not in copies:
            with torch._C.DisableTorchFunctionSubclass():
                copies[device] = self.as_subclass(Tensor).to(device, non_blocking=True)
        return copies[device]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Let slices stay on the CPU too; all other results are ordinary tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func in _STAYING:
                return result.as_subclass(cls)
            return result.as_subclass(Tensor) if isinstance(result, cls) else result


_STAYING = {Tensor.__getitem__, Tensor.index_select, Tensor.pin_memory}


def on_host(tensor: Tensor) -> HostTensor:
    """Return a tensor of the CPU as one that stays there."""
    return tensor.as_subclass(HostTensor)


class HostInputs:
    """Adds to a batch what the model would make of its values: positions, lengths of sequences, and windows.

    :param config: The config of a supported backbone.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        kind: Any = MODEL_MAPPING[type(config)]
        # The class's own functions, of a model without weights: they take nothing but the config.
        self._model: Any = kind.__new__(kind)
        nn.Module.__init__(self._model)
        self._model.config = config

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with what a forward pass takes instead of computing it.

        :param batch: Right-padded ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (int64 ``[B, L]``) and,
            where there are images, ``image_grid_thw`` (int64 ``[images, 3]``).
        :returns: With ``position_ids``, int64 ``[3, B, L]``. With images, ``image_grid_thw`` stays on the CPU, and
            there are the vision encoder's own: ``image_position_ids`` (int64 ``[patches, 2]``), ``image_cu_seqlens``
            (int32 ``[images + 1]``, on the CPU), ``image_max_seqlen`` and, for windows, ``image_window_index`` (int64
            ``[visual tokens]``), ``image_cu_window_seqlens`` and ``image_max_window_seqlen``; for Qwen3-VL,
            ``image_interp_indices`` and ``image_interp_weights`` (``[patches, 4]``).
        :raises ValueError: If the visual tokens are not those of the images.
        """
        rows, length = batch["input_ids"].shape
        batch = {name: on_host(each.cpu()) if name.startswith("image_") else each for name, each in batch.items()}
        if "image_grid_thw" not in batch:
            return {**batch, "position_ids": torch.arange(length).expand(3, rows, length)}
        ids, mask, kinds, grids = (
            batch[name].cpu() for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        )
        found = int((kinds == 1).sum())
        expected = int(grids.prod(dim=1).sum()) // self.config.vision_config.spatial_merge_size**2
        if found != expected:
            raise ValueError(f"the batch has {found} visual tokens, but its images are of {expected}")
        positions, _ = self._model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask
        )
        return {**batch, "position_ids": positions, **image_inputs(grids, self.config.vision_config)}

    def after(self, collate: Callable[[Any], Mapping[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """Return a collator that adds to the batches of another."""
        return partial(_collate, self, collate)


def _collate(
    prepare: HostInputs,
    collate: Callable[[Any], Mapping[str, Any]],
    examples: Any,  # noqa: ANN401
) -> dict[str, Any]:
    return prepare(collate(examples))


def image_inputs(grids: Tensor, config: PreTrainedConfig) -> dict[str, Any]:
    """Return the part of what ``HostInputs`` adds that depends on ``image_grid_thw`` alone, with the grids.

    :param config: Of the vision encoder.
    """
    if not TAKES_PREPARED_VISION:
        return {"image_grid_thw": on_host(grids)}
    from transformers import vision_utils as made

    merge_size, window_size = config.spatial_merge_size, config.to_dict().get("window_size")
    boundaries = made.get_vision_cu_seqlens(grids)
    found = {
        "grid_thw": on_host(grids),
        "position_ids": made.get_vision_position_ids(grids, merge_size),
        "cu_seqlens": on_host(boundaries),
        "max_seqlen": int(boundaries.diff().max()),
    }
    if (side := config.to_dict().get("num_position_embeddings")) and hasattr(made, PREPARES_INTERPOLATION):
        found["interp_indices"], found["interp_weights"] = made.get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=int(side**0.5), align_corners=True, spatial_merge_size=merge_size
        )
    if window_size is not None:
        index, boundaries = made.get_vision_window_index(grids, merge_size, window_size, config.patch_size)
        found |= {"window_index": index, "cu_window_seqlens": on_host(boundaries)}
        found["max_window_seqlen"] = int(boundaries.diff().max())
    return {f"image_{name}": value for name, value in found.items()}


def with_host_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with what ``HostInputs`` adds, on the model's device; a batch without it is read from there."""
    return on_device(model, batch if "position_ids" in batch else HostInputs(model.config)(batch))


def on_device(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch of ``HostInputs`` with copies on the model's device of what the model computes with."""
    return {name: _on(value, model.device) if name in _ON_DEVICE else value for name, value in batch.items()}


def forward_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of ``model.base_model`` for a batch, without its mask, reading nothing from the device.

    Images are embedded and put in the place of their tokens, as the stock class does it: there, the device has to say
    how many tokens that are.

    :param batch: Of ``HostInputs``.
    """
    base: Any = model.base_model
    batch = with_host_inputs(model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if "pixel_values" not in batch:
        return inputs
    seen = run_vision(model, batch)
    features = seen.pooler_output
    embedded = base.get_input_embeddings()(inputs.pop("input_ids"))
    is_visual = batch["mm_token_type_ids"] == 1
    merged = embedded.flatten(0, 1).index_copy(0, places(is_visual, len(features)), features.to(embedded.dtype))
    if of_layers := seen.get("deepstack_features"):
        _feed_inner_layers(base.language_model, is_visual, of_layers)
    return inputs | {"inputs_embeds": merged.view_as(embedded)}


def _feed_inner_layers(language_model: Any, is_visual: Tensor, features: Sequence[Tensor]) -> None:  # noqa: ANN401
    """Let the next forward pass add features of images (Qwen3-VL) after its first layers, as the stock class does."""

    def feed(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
        hook.remove()
        return args, {**kwargs, "visual_pos_masks": is_visual, "deepstack_visual_embeds": features}

    hook = language_model.register_forward_pre_hook(feed, with_kwargs=True)
    language_model._deepstack_process = _add_features  # the class's own waits for the device


def _add_features(hidden_states: Tensor, is_visual: Tensor, features: Tensor) -> Tensor:
    where = places(is_visual, len(features))
    return hidden_states.flatten(0, 1).index_add(0, where, features.to(hidden_states.dtype)).view_as(hidden_states)


def run_vision(model: PreTrainedModel, batch: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the vision encoder's outputs, of which ``pooler_output`` are the features, ``[visual tokens, D]``.

    :param batch: Of ``HostInputs``.
    """
    visual: Any = model.base_model.visual
    given = {name.removeprefix("image_"): value for name, value in batch.items() if name.startswith("image_")}
    if not TAKES_PREPARED_VISION or (hasattr(visual, "pos_embed") and "interp_indices" not in given):
        given["grid_thw"] = given["grid_thw"].on(model.device)  # which is read there
    return visual(batch["pixel_values"].to(visual.dtype), **given)


def places(mask: Tensor, count: int) -> Tensor:
    """Return where a mask of ``count`` true values is true, as numbers into it flattened: int64 ``[count]``.

    Unlike ``nonzero``, it does not wait for the device to count them.
    """
    return mask.flatten().int().argsort(descending=True, stable=True)[:count]


_ON_DEVICE = frozenset(
    {
        *("input_ids", "attention_mask", "mm_token_type_ids", "position_ids"),
        *("image_position_ids", "image_window_index", "image_interp_indices", "image_interp_weights"),
    }
)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.on(device) if isinstance(tensor, HostTensor) else tensor.to(device, non_blocking=True)
