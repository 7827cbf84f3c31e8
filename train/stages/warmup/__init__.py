"""Stage 1, warm-up: bidirectional attention by joint reconstruction of text and pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cocoa_embed.train.stages.stage import Stage
from cocoa_embed.train.stages.warmup.settings import WarmupSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

    from cocoa_embed.model.backbone import Backbone
    from cocoa_embed.train.data.rows import Row
    from cocoa_embed.train.loop.stage_trainer import StageTrainer
    from cocoa_embed.train.loop.trainer import StageContext
    from cocoa_embed.train.stages.pixel_decoder import PixelDecoder


class Warmup(Stage[WarmupSettings]):
    """Some text tokens and some visual tokens of ``[image][text]<EOS>`` are masked and reconstructed."""

    @property
    def shown_metrics(self) -> Mapping[str, str]:
        """Both losses, and the accuracy on masked tokens."""
        return {"loss": "loss", "mntp_loss": "text", "mae_loss": "pixels", "masked_token_accuracy": "accuracy"}

    def sequences(self, row: Row, processor: ProcessorMixin, config: PreTrainedConfig) -> list[dict[str, Tensor]]:
        """Return the row's one sequence."""
        from cocoa_embed.model.backbone import PatchGeometry
        from cocoa_embed.train.data.rows import numbered
        from cocoa_embed.train.stages.warmup.collator import WarmupCollator

        geometry = PatchGeometry.from_config(config)
        return [WarmupCollator(processor, geometry, self.run.seed, self.settings)(numbered([row]))]

    def extra_module(self, model: PreTrainedModel) -> PixelDecoder:
        """Return the pixel decoder."""
        from cocoa_embed.model.backbone import PatchGeometry
        from cocoa_embed.train.stages.pixel_decoder import PixelDecoder

        return PixelDecoder(model, PatchGeometry.from_config(model.config))

    def trainer(self, backbone: Backbone, rows: Sequence[Row], context: StageContext) -> StageTrainer:
        """Return the trainer; the pixel decoder in its model is not saved."""
        from cocoa_embed.train.loop.stage_trainer import stage_trainer
        from cocoa_embed.train.stages.warmup.collator import WarmupCollator
        from cocoa_embed.train.stages.warmup.model import WarmupModel

        model = WarmupModel(backbone.model, backbone.geometry, self.settings)
        collator = WarmupCollator(backbone.processor, backbone.geometry, self.run.seed, self.settings)
        return stage_trainer(model, backbone.model, rows, collator, self.settings, context)
