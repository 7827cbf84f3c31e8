"""Attention of the vision encoder in one call per layer, over the sequences of all images or all windows."""

from collections.abc import Callable
from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.host_tensor import HostTensor

REGISTERED = "cocoa_flash_varlen"
"""The name of the attention in transformers, which passes packed sequences only to names that contain ``flash``."""

FIRST_CAPABILITY = 8
"""The oldest generation of CUDA devices with kernels for packed sequences (Ampere)."""


def pack_vision_attention(model: PreTrainedModel) -> None:
    """Have the vision encoder call attention once per layer, in place, if it takes all images as one sequence.

    The model's config does not keep this setting.
    """
    AttentionInterface.register(REGISTERED, packed_attention)
    family = family_of(model.config)
    if not family.packs_attention:
        return
    config = copy(family.encoder(model).config)
    config._attn_implementation = REGISTERED
    for layer in family.vision_layers(model):
        attention: Any = layer.get_submodule(family.parts.attention)
        attention.config = config


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute full attention within each of the packed sequences; a transformers attention function.

    On CUDA in half precision, one kernel runs all of them; elsewhere sdpa runs sequences of equal length together.

    :param query: ``[1, heads, L, head width]``, like ``key`` and ``value``.
    :param cu_seq_lens_q: The boundaries of the sequences, int32 ``[sequences + 1]``.
    :param max_length_q: The length of the longest sequence.
    :returns: ``[1, L, heads, head width]``, and None.
    """
    kwargs = {name: given for name, given in kwargs.items() if name in ("dropout", "scaling", "is_causal")}
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if (kernel := _kernel(query)) is not None:
        on_device = cu_seq_lens_q.on(query.device) if isinstance(cu_seq_lens_q, HostTensor) else cu_seq_lens_q
        packed = (each[0].transpose(0, 1) for each in (query, key, value))
        longest = int(max_length_q)  # a CPU tensor in older versions of transformers
        return kernel(*packed, on_device, on_device, longest, longest)[None], None
    lengths = [end - begin for begin, end in pairwise(cu_seq_lens_q.tolist())]
    sequences = [each.split(lengths, dim=2) for each in (query, key, value)]
    outputs: dict[int, Tensor] = {}
    for length in dict.fromkeys(lengths):
        equal = [place for place, each in enumerate(lengths) if each == length]
        q, k, v = (torch.cat([of_all[place] for place in equal]) for of_all in sequences)
        found, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs)
        outputs |= zip(equal, found.split(1), strict=True)
    return torch.cat([outputs[place] for place in range(len(lengths))], dim=1), None


def _kernel(query: Tensor) -> Callable[..., Any] | None:
    """Return torch's attention over packed sequences, if it runs here."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % 8:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    enough = torch.version.hip is None and torch.cuda.get_device_capability(query.device)[0] >= FIRST_CAPABILITY
    return varlen_attn if enough else None
