"""Bidirectional attention, the probe that proves it, and the bridge mask."""

from enum import IntEnum

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocoa_embed.errors import CocoaError

TRANSFORMERS_FLOOR = "5.5.4"
"""The oldest transformers that embeds rightly: 5.2 and 5.3 leave Qwen2-VL and Qwen2.5-VL causal; 5.4 to 5.5.3 multiply
the moments of Qwen2.5-VL's images as if they were videos, and stop where a batch has more images than tokens a row."""


class Block(IntEnum):
    """What a position of a bridge sequence ``[block A] <EOS> [block B]`` belongs to."""

    PAD = 0
    A = 1
    EOS = 2
    B = 3


def make_bidirectional(model: PreTrainedModel) -> None:
    """Let every token of the language model attend to every other, in place; saved with the model's config.

    :raises CocoaError: If the model stays causal, as it does with transformers before 5.4, or is broken.
    """
    model.config.get_text_config().is_causal = False
    assert_bidirectional(model)


def make_causal(model: PreTrainedModel) -> None:
    """Let every token of the language model attend to itself and to those before it, in place; saved with the config.

    It is what the backbones come with, said aloud: ``is_causal`` can tell it.
    """
    model.config.get_text_config().is_causal = True


def is_causal(model: PreTrainedModel) -> bool:
    """Tell which of ``make_bidirectional`` and ``make_causal`` was called on a model last."""
    return bool(model.config.get_text_config().is_causal)


@torch.no_grad()
def assert_bidirectional(model: PreTrainedModel) -> None:
    """Check that the last token reaches the first token's hidden state, with and without padding.

    :raises CocoaError: If it does not, naming the attention implementation, or the hidden states are not finite.
    """
    for padded in (False, True):
        if not _last_token_reaches_first(model, padded=padded):
            raise CocoaError(
                f"{type(model).__name__} with attn_implementation={model.config._attn_implementation!r} is causal "
                f"{'with' if padded else 'without'} padding although is_causal is False: its first hidden state does "
                f"not depend on its last token. Use transformers {TRANSFORMERS_FLOOR} or newer and one of eager, sdpa."
            )


def _last_token_reaches_first(model: PreTrainedModel, *, padded: bool) -> bool:
    length = 6
    input_ids = torch.arange(1, length + 1, device=model.device).repeat(2, 1)
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[1, -2:] = 0
    changed_ids = input_ids.clone()
    changed_ids[0, -1] = length + 1
    was_training = model.training
    model.eval()
    decoder = model.get_decoder()
    first, changed = (
        decoder(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state[0, 0]
        for ids in (input_ids, changed_ids)
    )
    model.train(was_training)
    if not torch.isfinite(changed).all():
        raise CocoaError(f"The hidden states of {type(model).__name__} are not finite: its weights are broken.")
    return not torch.equal(first, changed)


def bridge_mask(blocks: Tensor, *, eos_attends_to_b: bool = True) -> Tensor:
    """Return who attends to whom in the bridge stage (METHOD.md, stage 2).

    Block A and ``<EOS>`` see A and ``<EOS>``; block B sees ``<EOS>`` and B; ``<EOS>`` also sees B unless
    ``eos_attends_to_b`` is false. Padding is seen by no other position and sees only itself, so that no row of the
    softmax is empty.

    :param blocks: ``Block`` of every position, int64 ``[B, L]``.
    :returns: bool ``[B, L, L]``, rows attend to columns.
    :raises ValueError: If ``blocks`` is not two-dimensional or a row has not exactly one ``<EOS>`` position.
    """
    if blocks.ndim != 2:
        raise ValueError(f"blocks must be [B, L], got {tuple(blocks.shape)}")
    eos_counts = (blocks == Block.EOS).sum(dim=1)
    if not (eos_counts == 1).all():
        raise ValueError(f"each row needs exactly one <EOS> position, got {eos_counts.tolist()}")
    rows, columns = blocks[:, :, None], blocks[:, None, :]
    itself = torch.eye(blocks.shape[1], dtype=torch.bool, device=blocks.device)
    return sees(rows, columns, eos_attends_to_b=eos_attends_to_b) | (itself & (rows == Block.PAD))


def sees(rows: Tensor, columns: Tensor, *, eos_attends_to_b: bool) -> Tensor:
    """Return which rows attend to which columns, by the ``Block`` of each; padding is left to the caller.

    :param rows: int64, of any shape that goes with that of ``columns``.
    :returns: bool, of the shape of both together.
    """
    # Plain integers: a compiled mask of FlexAttention is made of these lines too.
    block_a, eos, block_b = int(Block.A), int(Block.EOS), int(Block.B)
    sees_b = (rows == block_b) | (rows == eos) if eos_attends_to_b else rows == block_b
    return (
        (((rows == block_a) | (rows == eos)) & (columns == block_a))
        | ((rows != int(Block.PAD)) & (columns == eos))
        | (sees_b & (columns == block_b))
    )


def bidirectional_mask(attention_mask: Tensor) -> Tensor:
    """Return the dense form of full attention under padding: bool ``[B, L, L]`` from a ``[B, L]`` mask of 0 and 1."""
    keep = attention_mask.bool()
    itself = torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)
    return (keep[:, :, None] & keep[:, None, :]) | (itself & ~keep[:, :, None])


def before_or_itself(allowed: Tensor) -> Tensor:
    """Take from a bool ``[B, L, L]`` mask what a causal model may not see: for each position, those after it."""
    return allowed & torch.ones(allowed.shape[-2:], dtype=torch.bool, device=allowed.device).tril()


def as_model_mask(allowed: Tensor, *, attn_implementation: str, dtype: torch.dtype) -> Tensor:
    """Turn a bool ``[B, L, L]`` mask into the 4-D ``attention_mask`` that a transformers model takes as it is.

    :returns: ``[B, 1, L, L]``: bool for sdpa, additive ``dtype`` for eager.
    :raises ValueError: For an implementation that takes no dense mask.
    """
    allowed = allowed[:, None]
    if attn_implementation == "sdpa":
        return allowed
    if attn_implementation == "eager":
        lowest = torch.finfo(dtype).min
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, lowest)
    raise ValueError(f"no dense mask for attn_implementation={attn_implementation!r}; use 'sdpa' or 'eager'")
