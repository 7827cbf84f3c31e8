"""The inputs of a SentenceTransformer in training, kept where nothing has to wait for them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cocoa_embed.model.forward_inputs import forward_inputs, with_host_inputs
from cocoa_embed.model.host_tensor import on_host
from cocoa_embed.train.stages.reconstruction import bridge_model_mask, full_model_mask

MODEL_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "image_grid_thw", "mm_token_type_ids")


def keep_on_host(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose tensors of int64 stay on the CPU.

    There a cached loss reads them to cut the batch, and ``prepare_forward`` to complete its parts.
    """
    return {
        name: on_host(value) if isinstance(value, Tensor) and value.dtype == torch.int64 else value
        for name, value in batch.items()
    }


def prepare_forward(
    module: nn.Module, args: tuple[dict[str, Any]], kwargs: dict[str, Any]
) -> tuple[tuple[dict[str, Any]], dict[str, Any]]:
    """Give a model all that it would otherwise read back from its device, as a forward pre-hook of its first module.

    It takes any features; those of ``keep_on_host`` without waiting. The model gets the mask that it would make itself:
    none for a batch without padding. One with ``blocks`` runs under the bridge mask, where ``<EOS>`` does not attend to
    block B.
    """
    model: Any = module.auto_model
    is_padded = not args[0]["attention_mask"].cpu().all()
    batch = with_host_inputs(model, args[0])
    mask = full_model_mask(model, batch["attention_mask"]) if is_padded else None
    if "blocks" in batch:
        mask = bridge_model_mask(model, batch["blocks"].to(model.device), eos_attends_to_b=False)
    inputs = dict.fromkeys(MODEL_INPUTS) | forward_inputs(model, batch)
    features = {**args[0], "attention_mask": batch["attention_mask"]}
    return (features,), {**kwargs, **inputs, "attention_mask": mask, "use_cache": False}
