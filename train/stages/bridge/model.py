"""The model of stage 2: the backbone under the bridge mask."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.losses import accuracy, masked_token_loss
from cocoa_embed.train.stages.reconstruction import (
    bridge_model_mask,
    full_model_mask,
    last_hidden_states,
    masked_token_logits,
)


class BridgeModel(nn.Module):
    """The backbone under the bridge mask."""

    accepts_loss_kwargs = True
    """The loss is already a mean over the step, so transformers must not divide it by the micro-batches."""

    def __init__(self, model: PreTrainedModel, *, eos_attends_to_b: bool = True) -> None:
        super().__init__()
        self.backbone = model
        self.eos_attends_to_b = eos_attends_to_b

    def predict(self, batch: Batch) -> Tensor:
        """Predict block B's masked tokens in a batch of ``BridgeCollator``: logits ``[masked tokens, V]``."""
        mask = bridge_model_mask(self.backbone, batch["blocks"], eos_attends_to_b=self.eos_attends_to_b)
        return masked_token_logits(self.backbone, last_hidden_states(self.backbone, batch, mask), batch)

    def embed(self, batch: Batch) -> Tensor:
        """Embed items of ``render_items`` as at inference, under full attention: ``[B, D]``, normalised."""
        mask = full_model_mask(self.backbone, batch["attention_mask"])
        hidden_states = last_hidden_states(self.backbone, batch, mask)
        eos = batch["attention_mask"].sum(dim=1) - 1
        rows = torch.arange(len(eos), device=eos.device)
        return nn.functional.normalize(hidden_states[rows, eos].float(), dim=1)

    def forward(
        self, *, totals: Mapping[str, float | Tensor] | None = None, embeds: bool = False, **batch: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss`` and ``masked_token_accuracy``, scalars, for a batch of the collator.

        :param totals: How many ``target_ids`` the whole step has, if the batch is a part of it.
        :param embeds: Return ``embeddings`` of a batch of items instead. Sharded weights are whole only in a forward
            pass, so ``embed`` has to be called from here.
        """
        if embeds:
            return {"embeddings": self.embed(batch)}
        logits, targets, total = self.predict(batch), batch["target_ids"], (totals or {}).get("target_ids")
        return {
            "loss": masked_token_loss(logits, targets, total=total),
            "masked_token_accuracy": accuracy(logits, targets, total=total),
        }
