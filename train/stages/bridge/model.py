"""The model of stage 2: the backbone under the bridge mask."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.model.attention import Block
from cocoa_embed.model.host_tensor import places
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.losses import accuracy, eos_similarity, masked_token_loss, own_states
from cocoa_embed.train.stages.reconstruction import (
    bridge_model_mask,
    full_model_mask,
    last_hidden_states,
    masked_token_logits,
)


class BridgeModel(nn.Module):
    """The backbone under the bridge mask.

    :param eos_similarity_weight: The weight of the mean squared cosine between a row's ``<EOS>`` states, if there are
        several.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_attends_to_b: bool = True,
        eos_tokens: int = 1,
        eos_similarity_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = model
        self.eos_attends_to_b = eos_attends_to_b
        self.eos_tokens, self.eos_similarity_weight = eos_tokens, eos_similarity_weight

    def hidden_states(self, batch: Batch) -> Tensor:
        """Run a batch of ``BridgeCollator``: ``[B, L, D]``."""
        mask = bridge_model_mask(self.backbone, batch["blocks"], eos_attends_to_b=self.eos_attends_to_b)
        return last_hidden_states(self.backbone, batch, mask)

    def predict(self, batch: Batch) -> Tensor:
        """Predict block B's masked tokens in a batch of ``BridgeCollator``: logits ``[masked tokens, V]``."""
        return masked_token_logits(self.backbone, self.hidden_states(batch), batch)

    def embed(self, batch: Batch) -> Tensor:
        """Embed items of ``render_items`` as at inference, under full attention: vector 1, normalised ``[B, D]``."""
        mask = full_model_mask(self.backbone, batch["attention_mask"])
        hidden_states = last_hidden_states(self.backbone, batch, mask)
        eos = batch["attention_mask"].sum(dim=1) - 1
        rows = torch.arange(len(eos), device=eos.device)
        return nn.functional.normalize(hidden_states[rows, eos].float(), dim=1)

    def forward(
        self, *, totals: Mapping[str, float | Tensor] | None = None, embeds: bool = False, **batch: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss`` and ``masked_token_accuracy``, scalars, for a batch of the collator.

        With several ``<EOS>`` there is ``eos_similarity_loss``, too.

        :param totals: How many ``target_ids`` and rows (``target_prefixes``) the whole step has, if the batch is a part
            of it.
        :param embeds: Return ``embeddings`` of a batch of items instead. Sharded weights are gathered only in a forward
            pass, so ``embed`` must be called from here.
        """
        if embeds:
            return {"embeddings": self.embed(batch)}
        hidden_states, targets, totals = self.hidden_states(batch), batch["target_ids"], totals or {}
        logits, total = masked_token_logits(self.backbone, hidden_states, batch), totals.get("target_ids")
        outputs = {
            "loss": masked_token_loss(logits, targets, total=total),
            "masked_token_accuracy": accuracy(logits, targets, total=total),
        }
        if self.eos_tokens > 1:
            is_eos = (batch["blocks"] == Block.EOS) | (batch["blocks"] == Block.UNSEEN)
            of_rows = (len(is_eos), self.eos_tokens)
            states = own_states(hidden_states, places(is_eos, math.prod(of_rows))).unflatten(0, of_rows)
            outputs["eos_similarity_loss"] = eos_similarity(states, total=totals.get("target_prefixes"))
            outputs["loss"] = outputs["loss"] + self.eos_similarity_weight * outputs["eos_similarity_loss"]
        return outputs
