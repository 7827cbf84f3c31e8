"""Bidirectional attention, a probe that verifies it, and the bridge mask."""

from enum import IntEnum

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocoa_embed.errors import CocoaError

TRANSFORMERS_FLOOR = "5.5.4"
"""The oldest transformers with correct embeddings: 5.2 and 5.3 leave Qwen2-VL and Qwen2.5-VL causal; 5.4 to 5.5.3 scale
the temporal positions of Qwen2.5-VL's images as if they were videos, and fail if a batch has more images than a row has
tokens."""


class Block(IntEnum):
    """The block of a position in a bridge sequence ``[block A] <EOS> [block B]``.

    If there are several ``<EOS>``, those that block B does not attend to are ``UNSEEN``.
    """

    PAD = 0
    A = 1
    EOS = 2
    B = 3
    UNSEEN = 4


def make_bidirectional(model: PreTrainedModel) -> None:
    """Make the language model bidirectional, in place; its config keeps the setting when it is saved.

    :raises CocoaError: If the model stays causal, as with transformers before 5.4, or its weights are broken.
    """
    model.config.get_text_config().is_causal = False
    assert_bidirectional(model)


def make_causal(model: PreTrainedModel) -> None:
    """Keep the language model causal, as backbones are by default, and record it in the config for ``is_causal``."""
    model.config.get_text_config().is_causal = True


def is_causal(model: PreTrainedModel) -> bool:
    """Return whether ``make_causal``, and not ``make_bidirectional``, was called on the model last."""
    return bool(model.config.get_text_config().is_causal)


@torch.no_grad()
def assert_bidirectional(model: PreTrainedModel) -> None:
    """Check that the first token's hidden state depends on the last token, with and without padding.

    :raises CocoaError: If it does not, or if the hidden states are not finite.
    """
    length = 6
    input_ids = torch.arange(1, length + 1, device=model.device).repeat(2, 1)
    changed_ids = input_ids.clone()
    changed_ids[0, -1] = length + 1
    attention_mask = torch.ones_like(input_ids)
    was_training = model.training
    for padding in ("without", "with"):
        model.eval()
        first, changed = (
            model.get_decoder()(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state[0, 0]
            for ids in (input_ids, changed_ids)
        )
        model.train(was_training)
        if not torch.isfinite(changed).all():
            raise CocoaError(f"The hidden states of {type(model).__name__} are not finite: its weights are broken.")
        if torch.equal(first, changed):
            raise CocoaError(
                f"{type(model).__name__} with attn_implementation={model.config._attn_implementation!r} is causal "
                f"{padding} padding although is_causal is False: its first hidden state does not depend on its last "
                f"token. Use transformers {TRANSFORMERS_FLOOR} or newer and one of eager, sdpa."
            )
        attention_mask[1, -2:] = 0


def bridge_mask(blocks: Tensor, *, eos_attends_to_b: bool = True) -> Tensor:
    """Return the attention mask of the bridge stage (``docs/method.md``).

    Block A and ``<EOS>`` attend to A and ``<EOS>``; block B attends to ``<EOS>`` and B; ``<EOS>`` also attends to B
    unless ``eos_attends_to_b`` is false. An unseen ``<EOS>`` is treated like the others, but B does not attend to it.
    No other position attends to padding, and padding attends only to itself, so that no row of the softmax is empty.

    :param blocks: ``Block`` of every position, int64 ``[B, L]``, with at least one ``<EOS>`` in each row.
    :returns: bool ``[B, L, L]``: true where a row attends to a column.
    """
    rows, columns = blocks[:, :, None], blocks[:, None, :]
    itself = torch.eye(blocks.shape[1], dtype=torch.bool, device=blocks.device)
    return sees(rows, columns, eos_attends_to_b=eos_attends_to_b) | (itself & (rows == Block.PAD))


def sees(rows: Tensor, columns: Tensor, *, eos_attends_to_b: bool) -> Tensor:
    """Return which rows attend to which columns, by the ``Block`` of each; the caller handles padding.

    :param rows: int64, of any shape that broadcasts with ``columns``.
    :returns: bool, of the broadcast shape.
    """
    # Plain integers: FlexAttention compiles these lines too.
    block_a, eos, block_b, unseen = int(Block.A), int(Block.EOS), int(Block.B), int(Block.UNSEEN)
    any_eos = (rows == eos) | (rows == unseen)
    sees_b = (rows == block_b) | any_eos if eos_attends_to_b else rows == block_b
    return (
        (((rows == block_a) | any_eos) & ((columns == block_a) | (columns == unseen)))
        | ((rows != int(Block.PAD)) & (columns == eos))
        | (sees_b & (columns == block_b))
    )


def bidirectional_mask(attention_mask: Tensor) -> Tensor:
    """Return the mask of full attention, except to padding: bool ``[B, L, L]`` from a ``[B, L]`` mask of 0 and 1."""
    keep = attention_mask.bool()
    itself = torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)
    return (keep[:, :, None] & keep[:, None, :]) | (itself & ~keep[:, :, None])


def as_model_mask(allowed: Tensor, *, attn_implementation: str, dtype: torch.dtype) -> Tensor:
    """Turn a bool ``[B, L, L]`` mask into the 4-D ``attention_mask`` that transformers models use unchanged.

    :param attn_implementation: ``sdpa`` or ``eager``.
    :returns: ``[B, 1, L, L]``: bool for sdpa, additive ``dtype`` for eager.
    """
    allowed = allowed[:, None]
    if attn_implementation == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
