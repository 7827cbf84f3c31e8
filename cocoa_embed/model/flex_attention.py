"""FlexAttention under the bridge mask: it never computes fully masked tiles of the score matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.attention import Block, sees

FLEX = "flex_attention"
"""The name of FlexAttention in recipes and for ``load_backbone``."""

REGISTERED = "cocoa_flex"
"""The name of FlexAttention in the language model's config: the model classes refuse transformers' own name."""

TILE = 128
"""Rows and columns of a tile, the default of FlexAttention's kernels."""

FIRST_DYNAMIC_TORCH = "2.7"
"""With torch 2.6, transformers recompiles FlexAttention for every sequence length, and stops after a few."""


def refuse_flex_attention(device_type: str) -> None:
    """Check that FlexAttention can be trained here; elsewhere it has no backward pass.

    :param device_type: As in ``torch.device(...).type``.
    :raises UsageError: Without CUDA, or with an older torch.
    """
    if device_type != "cuda" or torch.__version__ < FIRST_DYNAMIC_TORCH:
        raise UsageError(
            f"{FLEX} can be trained with torch {FIRST_DYNAMIC_TORCH} or newer on 'cuda', not with {torch.__version__} "
            f"on {device_type!r}; use sdpa."
        )


def use_flex_attention(model: PreTrainedModel) -> None:
    """Let the language model use FlexAttention wherever its mask is a ``BlockMask``, in place.

    Other masks and the vision encoder use sdpa. A saved model does not keep this setting.
    """
    # Otherwise it would run unfused once there are more shapes than torch compiles for.
    torch._dynamo.config.fail_on_cache_limit_hit = True
    AttentionInterface.register(REGISTERED, flex_or_sdpa)
    AttentionMaskInterface.register(REGISTERED, sdpa_mask)
    model.set_attn_implementation({"text_config": REGISTERED, "vision_config": "sdpa"})


def uses_flex_attention(model: PreTrainedModel) -> bool:
    """Return whether ``use_flex_attention`` was called on a model."""
    return model.config.get_text_config()._attn_implementation == REGISTERED


def flex_or_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with FlexAttention under a ``BlockMask``, otherwise with sdpa; a transformers attention function.

    Under autocast, rotary embeddings leave queries and keys in float32 while values are bfloat16. sdpa casts them
    itself; FlexAttention before torch 2.9 refuses them.

    Sequences are padded to whole tiles, as their mask is: torch compiles FlexAttention for few lengths.

    :param query: ``[B, heads, L, head width]``; ``key`` and ``value`` may have fewer heads.
    :returns: ``[B, L, heads, head width]``, and None.
    :raises CocoaError: If there are more shapes than torch compiles for.
    """
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    length = query.shape[2]
    padding = (0, 0, 0, attention_mask.seq_lengths[0] - length)
    padded = [functional.pad(each.to(value.dtype), padding) for each in (query, key, value)]
    try:
        found, _ = flex_attention_forward(module, padded[0], padded[1], padded[2], attention_mask, **kwargs)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise CocoaError(
            f"{FLEX} has run with more shapes than torch compiles for, the last being {len(query)} sequences of up to "
            f"{length} tokens; use attn_implementation=sdpa."
        ) from error
    return found[:, :length], None


def bridge_block_mask(blocks: Tensor, *, eos_attends_to_b: bool = True) -> BlockMask:
    """Return ``bridge_mask`` as tiles, without building ``[B, L, L]``.

    The blocks in a tile's rows and columns decide its kind: if all pairs are allowed, the kernel reads no mask; if
    none is, the tile is not computed.

    :param blocks: ``Block`` of every position, int64 ``[B, L]``.
    :returns: A ``BlockMask`` of shape ``[B, 1, L, L]``, where L is rounded up to whole tiles of padding.
    """
    length = -(-blocks.shape[1] // TILE) * TILE
    blocks = functional.pad(blocks, (0, length - blocks.shape[1]), value=int(Block.PAD))
    some, every = _tiles(blocks, eos_attends_to_b=eos_attends_to_b)

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows, columns = blocks[row, query], blocks[row, key]
        allowed = sees(rows, columns, eos_attends_to_b=eos_attends_to_b)
        return allowed | ((rows == int(Block.PAD)) & (query == key))

    return BlockMask.from_kv_blocks(
        *_in_order(some & ~every), *_in_order(every), BLOCK_SIZE=TILE, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def bidirectional_block_mask(attention_mask: Tensor) -> BlockMask:
    """Return ``bidirectional_mask`` as tiles, from a ``[B, L]`` mask of 0 and 1."""
    return bridge_block_mask(attention_mask.long() * int(Block.A))


def _tiles(blocks: Tensor, *, eos_attends_to_b: bool) -> tuple[Tensor, Tensor]:
    """Return in which tiles some pair of positions is allowed, and in which all are: bool ``[B, 1, tiles, tiles]``.

    Padding makes no tile full and, off the diagonal, none visible.
    """
    kinds = torch.arange(len(Block), device=blocks.device)
    tiles = blocks.shape[1] // TILE
    present = (blocks.view(-1, tiles, TILE, 1) == kinds).any(dim=2)
    pairs = present[:, :, None, :, None] & present[:, None, :, None, :]
    allowed = sees(kinds[:, None], kinds[None, :], eos_attends_to_b=eos_attends_to_b)
    diagonal = torch.eye(tiles, dtype=torch.bool, device=blocks.device)
    has_padding = present[:, :, None, int(Block.PAD)]
    some = (pairs & allowed).flatten(3).any(dim=3) | (diagonal & has_padding)
    every = ~(pairs & ~allowed).flatten(3).any(dim=3)
    return some[:, None], every[:, None]


def _in_order(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen tiles in each row of tiles, and the columns, those of chosen tiles first: int32."""
    counts = tiles.sum(dim=-1, dtype=torch.int32)
    columns = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
    return counts.contiguous(), columns.to(torch.int32).contiguous()
