"""Stage 2, bridge: block B is reconstructed through ``<EOS>`` alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, ProcessorMixin

    from cocoa_embed.model.backbone import Backbone
    from cocoa_embed.train.data.rows import Row
    from cocoa_embed.train.loop.stage_trainer import StageTrainer
    from cocoa_embed.train.loop.trainer import StageContext

logger = logging.getLogger(__name__)


class Bridge(Stage[BridgeSettings]):
    """``[block A] <EOS> [block B]`` under the bridge mask, with most of block B masked."""

    has_sparse_mask = True

    @property
    def shown_metrics(self) -> Mapping[str, str]:
        """The accuracies on held-out rows, or on the batch if there are none."""
        if not self.settings.probe_rows:
            return {"loss": "loss", "masked_token_accuracy": "accuracy"}
        probed = {"matching": "matching image", "shuffled": "shuffled", "no": "no image"}
        return {"loss": "loss", **{f"accuracy_{image}_image": label for image, label in probed.items()}}

    def unusable(self, row: Row) -> str | None:
        """Return why a row cannot be split into blocks."""
        from cocoa_embed.train.stages.bridge.collator import lacks_block_b

        return lacks_block_b(row)

    def held_out(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Keep the probe's rows out of training, with every row that shares something with them."""
        from cocoa_embed.train.stages.probe import hold_out_rows

        return hold_out_rows(rows, self.settings.probe_rows)

    def sequences(self, row: Row, processor: ProcessorMixin, config: PreTrainedConfig) -> list[dict[str, Tensor]]:
        """Return the row's one sequence."""
        from cocoa_embed.train.data.rows import numbered
        from cocoa_embed.train.stages.bridge.collator import BridgeCollator

        return [BridgeCollator(processor, self.run.seed, self.settings.mask_ratio)(numbered([row]))]

    def trainer(self, backbone: Backbone, rows: Sequence[Row], context: StageContext) -> StageTrainer:
        """Return the trainer, with a probe on the rows held out."""
        from cocoa_embed.train.loop.stage_trainer import stage_trainer
        from cocoa_embed.train.loop.trainer import Probe
        from cocoa_embed.train.stages.bridge.collator import BridgeCollator
        from cocoa_embed.train.stages.bridge.model import BridgeModel, bridge_probe
        from cocoa_embed.train.stages.probe import PROBE_METRICS

        settings, run = self.settings, self.run
        probe_rows, training_rows = self.held_out(rows)
        probe = None
        if probe_rows:
            measure = bridge_probe(
                backbone,
                probe_rows,
                settings.mask_ratio,
                seed=run.seed,
                prompts=run.prompts.model_dump(),
                batch_size=settings.mini_batch_size or settings.batch_size,
            )
            probe = Probe(measure, settings.probe_steps, PROBE_METRICS)
        elif settings.probe_rows:
            logger.warning(
                "Too few images to keep %d of them out of training (at least %d are needed), so what <EOS> carries is "
                "not measured. Lower %s.probe_rows.",
                settings.probe_rows,
                max(4, 2 * settings.probe_rows),
                self.name,
            )
        return stage_trainer(
            BridgeModel(backbone.model, eos_attends_to_b=settings.eos_attends_to_b),
            backbone.model,
            training_rows,
            BridgeCollator(backbone.processor, run.seed, settings.mask_ratio),
            settings,
            context,
            probe=probe,
        )
