"""Stage 2, bridge: block B reconstructed through ``<EOS>`` alone (METHOD.md)."""

import logging
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.backbone import Backbone
from cocoa_embed.train.collators import Batch, reconstruction_collator
from cocoa_embed.train.data import Row
from cocoa_embed.train.losses import accuracy, mntp_loss
from cocoa_embed.train.probe import EosProbe, hold_out_rows
from cocoa_embed.train.reconstruction import bridge_model_mask, hidden_token_logits, last_hidden_states, position_ids
from cocoa_embed.train.sections import BridgeSection
from cocoa_embed.train.stage_trainer import StageContext, StageTrainer, reconstruction_trainer

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

    def forward(
        self, *, hidden_token_total: float | None = None, hidden_patch_total: float | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss`` and ``hidden_token_accuracy``, scalars, for a batch of the collator.

        :param hidden_token_total: Hidden tokens of the whole step, where the batch is a part of it.
        :param hidden_patch_total: Of no meaning here: no patches are hidden.
        """
        logits = self.predict(batch)
        targets, total = batch["target_ids"], hidden_token_total
        return {
            "loss": mntp_loss(logits, targets, total=total),
            "hidden_token_accuracy": accuracy(logits, targets, total=total),
        }


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
    probe = EosProbe(collator, probe_rows, section.micro_batch_size or section.batch_size) if probe_rows else None
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
