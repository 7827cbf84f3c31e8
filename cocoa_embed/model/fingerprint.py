"""Fingerprint an embedding model: a digest of its weights, chat template, prompts and pooling."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

IMAGE_SETTINGS = (
    *("size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "resample"),
    *("rescale_factor", "image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size"),
)
"""The image processor's settings that affect embeddings."""

SAMPLED_VALUES = 4096
"""The most values of each tensor that enter the digest, evenly spaced."""


def model_fingerprint(model: SentenceTransformer) -> str:
    """Return a digest that is equal for two models only if they embed the same inputs to the same vectors.

    It does not depend on the names of the weights (which change between versions of transformers), on the device, or on
    float32 against bfloat16: values are rounded to bfloat16 first. A model in float16 has its own fingerprint, as its
    values are rounded twice. At most ``SAMPLED_VALUES`` values of each tensor enter: training changes all values, but
    a single one changed by hand may go unnoticed.

    :return: 64 hexadecimal digits.
    """
    parts = {
        "modules": [describe_module(module) for module in model],
        "prompts": {name: prompt for name, prompt in sorted(model.prompts.items()) if prompt},
        "default_prompt": model.default_prompt_name,
        "weights": weights_digest(model.state_dict()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def describe_module(module: torch.nn.Module) -> dict[str, Any]:
    """Return the properties of a module that affect embeddings, besides its weights: kind, template, pooling and so on.

    Settings are picked by name, since a whole configuration differs between versions of transformers.
    """
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    from cocoa_embed.model.export import EosVectors

    described: dict[str, Any] = {"kind": type(module).__name__}
    if isinstance(module, Pooling):
        described["pooling"] = str(module.get_config_dict()["pooling_mode"])
    if isinstance(module, EosVectors):
        described["vectors"] = module.count
    if isinstance(module, Transformer):
        described |= {
            "template": module.processor.chat_template,
            "is_bidirectional": module.config.get_text_config().to_dict().get("is_causal") is False,
            "max_seq_length": module.max_seq_length,
            "images": image_settings(module.processor),
        }
    return described


def image_settings(processor: object) -> dict[str, Any]:
    """Return the settings of a processor that affect images; an empty dictionary if it takes no images."""
    from transformers import ProcessorMixin

    if not isinstance(processor, ProcessorMixin) or "image_processor" not in processor.get_attributes():
        return {}
    settings = json.loads(processor.image_processor.to_json_string())
    return {name: settings[name] for name in IMAGE_SETTINGS if settings.get(name) is not None}


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of tensors that does not depend on their names or order.

    :param state: Tensors of any shape, dtype and device, by name.
    :return: 64 hexadecimal digits.
    """
    return hashlib.sha256(b"".join(sorted(tensor_digest(tensor) for tensor in state.values()))).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """Return a digest of a tensor's shape and a sample of its values in bfloat16.

    :param tensor: A tensor of any shape, dtype and device.
    :return: 32 bytes.
    """
    import torch

    step = max(1, -(-tensor.numel() // SAMPLED_VALUES))
    sample = tensor.detach().reshape(-1)[::step].to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + sample.view(torch.int16).numpy().tobytes()).digest()
