"""Stage 2, bridge: block B reconstructed through ``<EOS>`` alone (METHOD.md)."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.loop.stage_trainer import StageContext, StageTrainer, reconstruction_trainer
from cocoa_embed.train.settings import BridgeSection
from cocoa_embed.train.stages.collators import Batch, reconstruction_collator, render_items
from cocoa_embed.train.stages.losses import accuracy, mntp_loss
from cocoa_embed.train.stages.probe import EosProbe, GeometryProbe, Probe, hold_out_rows, together
from cocoa_embed.train.stages.reconstruction import (
    bridge_model_mask,
    full_model_mask,
    hidden_token_logits,
    last_hidden_states,
    position_ids,
)

logger = logging.getLogger(__name__)


class BridgeModel(nn.Module):
    """The backbone under the bridge mask."""

    accepts_loss_kwargs = True
    """The loss is a mean over the whole step already; transformers is not to divide it by the micro-batches."""

    def __init__(self, model: PreTrainedModel, *, eos_attends_to_b: bool = True) -> None:
        super().__init__()
        self.backbone = model
        self.eos_attends_to_b = eos_attends_to_b

    def predict(self, batch: Batch) -> Tensor:
        """Predict block B's hidden tokens in a batch of the bridge collator: logits ``[hidden tokens, V]``."""
        mask = bridge_model_mask(self.backbone, batch["blocks"], eos_attends_to_b=self.eos_attends_to_b)
        hidden_states = last_hidden_states(self.backbone, batch, mask, position_ids(self.backbone, batch))
        return hidden_token_logits(self.backbone, hidden_states, batch["hidden_tokens"])

    def embed(self, batch: Batch) -> Tensor:
        """Embed items that ``render_items`` has rendered, as at inference: ``[B, D]``.

        Every token sees every other; the embedding is the normalised last hidden state of ``<EOS>``.
        """
        mask = full_model_mask(self.backbone, batch["attention_mask"])
        hidden_states = last_hidden_states(self.backbone, batch, mask, position_ids(self.backbone, batch))
        eos = batch["attention_mask"].sum(dim=1) - 1
        rows = torch.arange(len(eos), device=eos.device)
        return nn.functional.normalize(hidden_states[rows, eos].float(), dim=1)

    def forward(
        self,
        *,
        hidden_token_total: float | None = None,
        hidden_patch_total: float | None = None,
        embeds: bool = False,
        **batch: Tensor,
    ) -> dict[str, Tensor]:
        """Return ``loss`` and ``masked_token_accuracy``, scalars, for a batch of the collator.

        :param embeds: Return ``embeddings`` instead, for a batch of items. It is asked for here, since weights that
            several devices share are whole in a forward pass alone.
        :param hidden_token_total: Hidden tokens of the whole step, where the batch is a part of it.
        :param hidden_patch_total: Of no meaning here: no patches are hidden.
        """
        if embeds:
            return {"embeddings": self.embed(batch)}
        logits = self.predict(batch)
        targets, total = batch["target_ids"], hidden_token_total
        return {
            "loss": mntp_loss(logits, targets, total=total),
            "masked_token_accuracy": accuracy(logits, targets, total=total),
        }


def bridge_probe(
    backbone: Backbone,
    rows: Sequence[Row],
    section: BridgeSection,
    *,
    seed: int,
    prompts: Mapping[str, str],
    batch_size: int,
) -> Probe:
    """Return what measures a ``BridgeModel`` on rows with different images: hidden tokens, and the geometry.

    :param seed: Of what is hidden.
    :param prompts: Instructions for ``query`` and ``document``, as the exported model has them.
    :param batch_size: Rows to run at once.
    """

    def collate(items: Sequence[Item], is_document: bool) -> Batch:
        return render_items(backbone.processor, items, prompt=prompts.get("document" if is_document else "query", ""))

    def embed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        embeddings: Tensor = model(**batch, embeds=True)["embeddings"]
        return embeddings

    collator = reconstruction_collator(section, backbone.processor, backbone.geometry, seed=seed)
    return together(EosProbe(collator, rows, batch_size), GeometryProbe(collate, embed, rows, batch_size))


def bridge_trainer(
    backbone: Backbone, rows: Sequence[Row], section: BridgeSection, context: StageContext
) -> StageTrainer:
    """Return the trainer of stage 2; the backbone's weights change in place.

    The first ``section.probe_rows`` rows with an image are kept out of training, for the probe.
    """
    collator = reconstruction_collator(section, backbone.processor, backbone.geometry, seed=context.seed)
    probe_rows, training_rows = hold_out_rows(rows, section.probe_rows)
    if section.probe_rows and not probe_rows:
        logger.warning(
            "Too few images to keep %d of them out of training (at least %d are needed): what <EOS> carries is not "
            "measured. Lower bridge.probe_rows.",
            section.probe_rows,
            max(4, 2 * section.probe_rows),
        )
    probe = (
        bridge_probe(
            backbone,
            probe_rows,
            section,
            seed=context.seed,
            prompts=context.prompts,
            batch_size=section.micro_batch_size or section.batch_size,
        )
        if probe_rows
        else None
    )
    return reconstruction_trainer(
        BridgeModel(backbone.model, eos_attends_to_b=section.eos_attends_to_b),
        backbone.model,
        training_rows,
        collator,
        section,
        context,
        stage="bridge",
        probe=probe,
        probe_steps=section.probe_steps,
    )
