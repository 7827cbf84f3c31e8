"""Stage 1, warm-up: bidirectional attention by joint reconstruction of text and pixels (METHOD.md)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from cocoa_embed.backbone import Backbone, PatchGeometry
from cocoa_embed.train.collators import Batch, WarmupCollator
from cocoa_embed.train.data import Row, Rows
from cocoa_embed.train.losses import accuracy, mae_loss, mntp_loss
from cocoa_embed.train.pixel_decoder import PixelDecoder
from cocoa_embed.train.reconstruction import (
    StageTrainer,
    bidirectional_model_mask,
    hidden_token_logits,
    last_hidden_states,
    position_ids,
)
from cocoa_embed.train.sections import WarmupSection


class WarmupModel(nn.Module):
    """The backbone with a pixel decoder beside it: ``loss = mntp + mae_weight * mae``."""

    accepts_loss_kwargs = False

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

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Predict what is hidden in a batch of :class:`~cocoa_embed.train.collators.WarmupCollator`.

        :returns: Logits ``[hidden tokens, V]``, and the patches ``[hidden patches, patch_width]`` where it has images.
        """
        positions = position_ids(self.backbone, batch)
        mask = bidirectional_model_mask(self.backbone, batch["attention_mask"])
        hidden_states = last_hidden_states(self.backbone, batch, mask, positions)
        logits = hidden_token_logits(self.backbone, hidden_states, batch["hidden_tokens"])
        if "hidden_patches" not in batch:
            return logits, None
        visual = batch["mm_token_type_ids"] == 1
        return logits, self.pixel_decoder(hidden_states, visual, mask, positions)[batch["hidden_patches"]]

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return ``loss`` and its parts, scalars, for a batch of the collator."""
        logits, patches = self.predict(batch)
        mntp = mntp_loss(logits, batch["target_ids"])
        parts = {"loss": mntp, "mntp_loss": mntp, "hidden_token_accuracy": accuracy(logits, batch["target_ids"])}
        if patches is not None:
            mae = mae_loss(patches, batch["target_patches"], normalise_targets=self.normalise_targets)
            parts |= {"loss": mntp + self.mae_weight * mae, "mae_loss": mae}
        return parts


def warmup_trainer(
    backbone: Backbone, rows: Sequence[Row], section: WarmupSection, *, seed: int, arguments: dict[str, Any]
) -> StageTrainer:
    """Return the trainer of stage 1; the backbone's weights change in place, the pixel decoder is thrown away."""
    return StageTrainer(
        model=WarmupModel(
            backbone.model,
            backbone.geometry,
            mae_weight=section.mae_weight,
            normalise_targets=section.normalise_targets,
        ),
        args=TrainingArguments(**arguments),
        train_dataset=Rows(rows),
        data_collator=WarmupCollator(
            backbone.processor,
            backbone.geometry,
            seed=seed,
            text_mask_ratio=section.text_mask_ratio,
            image_mask_ratio=section.image_mask_ratio,
            patch_fill=section.patch_fill,
        ),
    )
