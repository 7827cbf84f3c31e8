"""The bridge's loss as a small term of stage 3, on the rows of the same batch."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from cocoa_embed.data.rows import Row
from cocoa_embed.train.data.rows import Example
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.contrastive.mini_batches import TokenLimits, mini_batches, take
from cocoa_embed.train.stages.losses import masked_token_loss, predicting_states
from cocoa_embed.train.stages.rendering import row_images

COLUMN = "reconstruction"
"""The batch's column of masked sequences; to sentence-transformers it is one more column of items."""

MASKINGS = 16
"""The number of different maskings of a row, which take turns from epoch to epoch."""


def has_text(row: Row) -> bool:
    """Return whether a row has something to reconstruct."""
    return bool(row.query.text or row.positive.text)


def masked_column(collator: BridgeCollator, examples: Sequence[Example]) -> Batch:
    """Return the bridge's sequences of the rows with a content text, as a column; an empty one if there are none.

    In addition to the keys of ``BridgeCollator``, it has ``num_images_per_sample`` and ``masked_ids`` (int64
    ``[B, L]``): the ids of masked tokens, and -1 elsewhere.
    """
    usable = [(draw, row) for draw, row in examples if has_text(row)]
    if not usable:
        return {}
    batch = collator(usable)
    masked, ids = batch.pop("masked_tokens"), batch.pop("target_ids")
    batch["masked_ids"] = torch.full_like(batch["input_ids"], -1).masked_scatter(masked, ids)
    batch["num_images_per_sample"] = torch.tensor([len(row_images(row)) for _, row in usable])
    return {f"{COLUMN}_{name}": value for name, value in batch.items()}


def prepare_head(model: PreTrainedModel) -> nn.Module:
    """Return the model's language-model head, and freeze it, unless its weights are those of the embeddings."""
    head: Any = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(False)
    return head  # type: ignore[no-any-return]


def reconstruct(
    head: nn.Module, weight: float, model: nn.Module, column: dict[str, Any] | None, limits: TokenLimits
) -> Tensor:
    """Return the weighted loss on the masked tokens of a column; if gradients are on, also run the backward passes.

    Each mini-batch runs backward right after its forward pass, so that only one graph is kept at a time. The gradients
    are averaged over devices together with those of the contrastive loss, which follow.

    :param head: The language-model head, ``[..., D]`` to ``[..., V]``.
    :param model: The SentenceTransformer, wrapped for several devices or not.
    :param column: From ``masked_column``, without the prefix; None if no row of this device has a text.
    """
    device = next(model.parameters()).device
    parts = [] if column is None else [take(column, items) for items in mini_batches(column, limits)]
    count = sum(int((part["masked_ids"] >= 0).sum()) for part in parts)
    # Gradients are averaged over the devices, so each divides by its part of the step's total.
    total: Any = reduce(torch.tensor(float(count), device=device), "mean")
    loss = torch.zeros((), device=device)
    apart = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
    for part in parts:
        with apart():
            states = model(dict(part))["token_embeddings"]
            ids = part["masked_ids"].cpu().flatten()
            places = (ids >= 0).nonzero().flatten()
            logits = head.to(device)(predicting_states(states, places.to(device)))
            of_part = weight * masked_token_loss(logits, ids[places].to(device), total=total)
            if torch.is_grad_enabled():
                of_part.backward()
        loss += of_part.detach()
    return loss
