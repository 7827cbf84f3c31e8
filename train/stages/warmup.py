"""Stage 1, warm-up: bidirectional attention by joint reconstruction of text and pixels (METHOD.md)."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.data.rows import Row
from cocoa_embed.model.attention import is_causal
from cocoa_embed.model.backbone import Backbone, PatchGeometry
from cocoa_embed.train.loop.stage_trainer import StageContext, StageTrainer, reconstruction_trainer
from cocoa_embed.train.settings import WarmupSection
from cocoa_embed.train.stages.collators import Batch, reconstruction_collator
from cocoa_embed.train.stages.losses import accuracy, mae_loss, mntp_loss
from cocoa_embed.train.stages.pixel_decoder import PixelDecoder
from cocoa_embed.train.stages.reconstruction import (
    bidirectional_model_mask,
    full_model_mask,
    hidden_token_logits,
    last_hidden_states,
    position_ids,
)


class WarmupModel(nn.Module):
    """The backbone with a pixel decoder beside it: ``loss = mntp + mae_weight * mae``."""

    accepts_loss_kwargs = True
    """The loss is a mean over the whole step already; transformers is not to divide it by the micro-batches."""

    def __init__(
        self,
        model: PreTrainedModel,
        geometry: PatchGeometry,
        *,
        mae_weight: float = 0.5,
        normalise_targets: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = model
        self.pixel_decoder = PixelDecoder(model, geometry)
        self.mae_weight = mae_weight
        self.normalise_targets = normalise_targets

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predict what is hidden in a batch of ``WarmupCollator``.

        :returns: Logits ``[hidden tokens, V]`` and patches ``[hidden patches, patch_width]``.
        """
        positions = position_ids(self.backbone, batch)
        mask = bidirectional_model_mask(self.backbone, batch["attention_mask"])  # of the pixel decoder in any case
        own_mask = full_model_mask(self.backbone, batch["attention_mask"]) if is_causal(self.backbone) else mask
        hidden_states = last_hidden_states(self.backbone, batch, own_mask, positions)
        logits = hidden_token_logits(self.backbone, hidden_states, batch["hidden_tokens"])
        visual = batch["mm_token_type_ids"] == 1
        return logits, self.pixel_decoder(hidden_states, visual, mask, positions)[batch["hidden_patches"]]

    def forward(
        self, *, hidden_token_total: float | None = None, hidden_patch_total: float | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss`` and its parts, scalars, for a batch of the collator.

        :param hidden_token_total: Hidden tokens of the whole step, where the batch is a part of it.
        :param hidden_patch_total: Hidden patches of the whole step.
        """
        logits, patches = self.predict(batch)
        targets, total = batch["target_ids"], hidden_token_total
        mntp = mntp_loss(logits, targets, total=total)
        mae = mae_loss(
            patches, batch["target_patches"], normalise_targets=self.normalise_targets, total=hidden_patch_total
        )
        return {
            "loss": mntp + self.mae_weight * mae,
            "mntp_loss": mntp,
            "mae_loss": mae,
            "masked_token_accuracy": accuracy(logits, targets, total=total),
        }


def warmup_trainer(
    backbone: Backbone, rows: Sequence[Row], section: WarmupSection, context: StageContext
) -> StageTrainer:
    """Return the trainer of stage 1; the backbone's weights change in place, the pixel decoder is thrown away."""
    model = WarmupModel(
        backbone.model,
        backbone.geometry,
        mae_weight=section.mae_weight,
        normalise_targets=section.normalise_targets,
    )
    collator = reconstruction_collator(section, backbone.processor, backbone.geometry, seed=context.seed)
    return reconstruction_trainer(model, backbone.model, rows, collator, section, context, stage="warmup")
