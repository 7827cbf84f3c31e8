"""The forward pass of the reconstruction stages: attention masks, and the head applied to masked tokens only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from cocoa_embed.model.attention import as_model_mask, bidirectional_mask, bridge_mask, is_causal
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.flex_attention import bidirectional_block_mask, bridge_block_mask, uses_flex_attention
from cocoa_embed.model.forward_inputs import forward_inputs, on_device
from cocoa_embed.model.host_tensor import places
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.losses import predicting_states


def last_hidden_states(model: PreTrainedModel, batch: Batch, attention_mask: Tensor | BlockMask) -> Tensor:
    """Run the backbone without its head under a prepared attention mask: ``[B, L, D]``.

    The vision encoder also runs for a batch without images, so that its gradients are zero and not missing: all
    processes that share its weights must run it, with any rows.

    :param batch: From ``HostInputs``; without what that adds, this waits for the device.
    """
    # Before the language model, as with images: all processes must run the parts in the same order.
    idle = None if "pixel_values" in batch else _idle_vision_pass(model)
    outputs = model.base_model(**forward_inputs(model, batch), attention_mask=attention_mask, use_cache=False)
    hidden_states: Tensor = outputs.last_hidden_state
    return hidden_states if idle is None else hidden_states + 0 * idle


def _idle_vision_pass(model: PreTrainedModel) -> Tensor:
    """Run the vision encoder on the smallest possible grid: a scalar, to be multiplied by 0."""
    family = family_of(model.config)
    side = family.geometry.merge_size
    pixels = torch.zeros(side * side, family.geometry.patch_width, device=model.device, dtype=model.dtype)
    of_image = family.image_inputs(torch.tensor([[1, side, side]]))
    outputs = family.run_vision(model, on_device(model, {**of_image, "pixel_values": pixels}))
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return torch.stack([leaf.float().sum() for leaf in leaves]).sum()


def model_mask(model: PreTrainedModel, allowed: Tensor) -> Tensor:
    """Return ``allowed`` (bool ``[B, L, L]``) in the form that the model's attention implementation takes."""
    return as_model_mask(allowed, attn_implementation=str(model.config._attn_implementation), dtype=model.dtype)


def bidirectional_model_mask(model: PreTrainedModel, attention_mask: Tensor) -> Tensor | BlockMask:
    """Return the mask of full attention, except to padding, in the form that the model takes: ``[B, 1, L, L]``.

    :param attention_mask: int64 ``[B, L]``.
    """
    if uses_flex_attention(model):
        return bidirectional_block_mask(attention_mask)
    return model_mask(model, bidirectional_mask(attention_mask))


def full_model_mask(model: PreTrainedModel, attention_mask: Tensor) -> Tensor | BlockMask:
    """Return the mask of sequences without blocks (int64 ``[B, L]``) in the form that the model takes.

    Every token attends to every other; in a causal model, only to those before it.
    """
    if is_causal(model):
        return model_mask(model, bidirectional_mask(attention_mask).tril())
    return bidirectional_model_mask(model, attention_mask)


def bridge_model_mask(model: PreTrainedModel, blocks: Tensor, *, eos_attends_to_b: bool = True) -> Tensor | BlockMask:
    """Return the bridge mask of ``blocks`` (int64 ``[B, L]``) in the form that the model takes: ``[B, 1, L, L]``.

    In a causal model, no token attends to those after it.
    """
    if uses_flex_attention(model):
        return bridge_block_mask(blocks, eos_attends_to_b=eos_attends_to_b)
    allowed = bridge_mask(blocks, eos_attends_to_b=eos_attends_to_b)
    return model_mask(model, allowed.tril() if is_causal(model) else allowed)


def masked_token_logits(
    model: PreTrainedModel,
    hidden_states: Tensor,
    batch: Batch,
    states_of: Callable[[Tensor, Tensor], Tensor] = predicting_states,
) -> Tensor:
    """Apply the language-model head only where a masked token is predicted: ``[masked tokens, V]``.

    :param states_of: Returns the states that predict the masked tokens, as ``predicting_states`` does.
    """
    head: Any = model.get_output_embeddings()
    return head(states_of(hidden_states, masked_places(batch, "masked_tokens", "target_ids")))


def masked_places(batch: Batch, masked: str, targets: str) -> Tensor:
    """Return where a mask of the batch is true, as ``places`` does.

    The number of targets says how often that is; without targets, this waits for the device.
    """
    return places(batch[masked], len(batch[targets]) if targets in batch else int(batch[masked].sum()))
