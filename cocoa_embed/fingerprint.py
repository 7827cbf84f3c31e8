"""What tells one embedding model from another: a digest of its weights, its template, its prompts and its pooling."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

SAMPLED_VALUES = 4096
"""The values of each tensor that are looked at, evenly spread."""


def model_fingerprint(model: SentenceTransformer) -> str:
    """Return a digest that two models share only if they embed the same things to the same vectors.

    It is the same whatever the names of the weights (which change between versions of transformers), on every device,
    and in float32 and bfloat16: values are rounded to bfloat16 first. A model in float16 has a fingerprint of its own,
    as its values are rounded twice. Up to :data:`SAMPLED_VALUES` values of each tensor are looked at: training changes
    them all, changing one value by hand may go unseen.

    :return: 64 hexadecimal digits.
    """
    parts = {
        "modules": [describe_module(module) for module in model],
        "prompts": {name: prompt for name, prompt in sorted(model.prompts.items()) if prompt},
        "weights": weights_digest(model.state_dict()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def describe_module(module: torch.nn.Module) -> dict[str, str | None]:
    """Return what of a module besides its weights decides about the embedding: its kind, template and pooling."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    return {
        "kind": type(module).__name__,
        "template": module.processor.chat_template if isinstance(module, Transformer) else None,
        "pooling": str(module.get_config_dict()["pooling_mode"]) if isinstance(module, Pooling) else None,
    }


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of tensors, whatever their names and order.

    :param state: Tensors of any shape, dtype and device, by name.
    :return: 64 hexadecimal digits.
    """
    return hashlib.sha256(b"".join(sorted(tensor_digest(tensor) for tensor in state.values()))).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """Return a digest of a tensor's shape and of a sample of its values, in bfloat16.

    :param tensor: Of any shape, dtype and device.
    :return: 32 bytes.
    """
    import torch

    step = max(1, -(-tensor.numel() // SAMPLED_VALUES))
    sample = tensor.detach().reshape(-1)[::step].to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + sample.view(torch.int16).numpy().tobytes()).digest()
