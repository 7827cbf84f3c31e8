"""The model of stage 1: the backbone with a pixel decoder."""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.model.attention import is_causal
from cocoa_embed.model.backbone import PatchGeometry
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.losses import accuracy, mae_loss, mntp_loss
from cocoa_embed.train.stages.pixel_decoder import PixelDecoder
from cocoa_embed.train.stages.reconstruction import (
    bidirectional_model_mask,
    full_model_mask,
    last_hidden_states,
    masked_token_logits,
    position_ids,
)
from cocoa_embed.train.stages.warmup.settings import DEFAULTS, WarmupSettings


class WarmupModel(nn.Module):
    """The backbone with a pixel decoder: ``loss = mntp + mae_weight * mae``."""

    accepts_loss_kwargs = True
    """The loss is already a mean over the step, so transformers must not divide it by the micro-batches."""

    def __init__(self, model: PreTrainedModel, geometry: PatchGeometry, settings: WarmupSettings = DEFAULTS) -> None:
        super().__init__()
        self.backbone = model
        self.pixel_decoder = PixelDecoder(model, geometry)
        self.settings = settings

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predict what is masked in a batch of ``WarmupCollator``.

        :returns: Logits ``[masked tokens, V]`` and patches ``[masked patches, patch_width]``.
        """
        positions = position_ids(self.backbone, batch)
        mask = bidirectional_model_mask(self.backbone, batch["attention_mask"])  # the pixel decoder is never causal
        own_mask = full_model_mask(self.backbone, batch["attention_mask"]) if is_causal(self.backbone) else mask
        hidden_states = last_hidden_states(self.backbone, batch, own_mask, positions)
        logits = masked_token_logits(self.backbone, hidden_states, batch["masked_tokens"])
        visual = batch["mm_token_type_ids"] == 1
        return logits, self.pixel_decoder(hidden_states, visual, mask, positions)[batch["masked_patches"]]

    def forward(self, *, totals: Mapping[str, float] | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Return ``loss`` and its parts, scalars, for a batch of the collator.

        :param totals: How many ``target_ids`` and ``target_patches`` the whole step has, if the batch is a part of it.
        """
        totals = totals or {}
        logits, patches = self.predict(batch)
        targets, tokens = batch["target_ids"], totals.get("target_ids")
        mntp = mntp_loss(logits, targets, total=tokens)
        mae = mae_loss(
            patches,
            batch["target_patches"],
            normalise_targets=self.settings.normalise_targets,
            total=totals.get("target_patches"),
        )
        return {
            "loss": mntp + self.settings.mae_weight * mae,
            "mntp_loss": mntp,
            "mae_loss": mae,
            "masked_token_accuracy": accuracy(logits, targets, total=tokens),
        }
