"""Stage 2: its model, its batches, its probe and its trainer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.loop.batch_facts import Batch, Example
from cocoa_embed.train.loop.stage_trainer import StageTrainer, stage_trainer
from cocoa_embed.train.loop.trainer import Probe, StageContext
from cocoa_embed.train.stages.bridge.collator import BridgeCollator, lacks_block_b
from cocoa_embed.train.stages.bridge.model import BridgeModel, bridge_probe
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.probe import MATCHING_IMAGE, NO_IMAGE, PROBE_METRICS, SHUFFLED_IMAGE, hold_out_rows
from cocoa_embed.train.stages.samples import bridge_samples
from cocoa_embed.train.stages.stage import Stage

logger = logging.getLogger(__name__)


class Bridge(Stage[BridgeSettings]):
    """``[block A] <EOS> [block B]`` under the bridge mask, with most of block B masked."""

    has_sparse_mask = True
    has_samples = True

    @property
    def shown_metrics(self) -> Mapping[str, str]:
        """The accuracies on held-out rows, or on the batch if there are none."""
        if not self.settings.probe_rows:
            return {"loss": "loss", "masked_token_accuracy": "accuracy"}
        return {"loss": "loss", MATCHING_IMAGE: "matching image", SHUFFLED_IMAGE: "shuffled", NO_IMAGE: "no image"}

    def unusable(self, row: Row) -> str | None:
        """Return why a row cannot be split into blocks."""
        return lacks_block_b(row)

    def held_out(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Keep the probe's rows out of training, with every row that would leak them."""
        return hold_out_rows(rows, self.settings.probe_rows)

    def sequences(self, example: Example, processor: ProcessorMixin, config: PreTrainedConfig) -> list[Batch]:
        """Return the row's one sequence."""
        return [BridgeCollator(processor, self.run.seed, self.settings.mask_ratio)([example])]

    def trainer(self, backbone: Backbone, rows: Sequence[Row], context: StageContext) -> StageTrainer:
        """Return the trainer, with a probe on the rows held out."""
        settings, probe = self.settings, None
        collator = BridgeCollator(backbone.processor, self.run.seed, settings.mask_ratio)
        probe_rows, training_rows = self.held_out(rows)
        if probe_rows:
            size = settings.mini_batch_size or settings.batch_size
            measure = bridge_probe(collator, probe_rows, prompts=self.run.prompts.model_dump(), batch_size=size)
            probe = Probe(measure, settings.probe_steps, PROBE_METRICS)
        elif settings.probe_rows:
            logger.warning(
                "Too few images to keep %d of them out of training (at least %d are needed), so what <EOS> carries is "
                "not measured. Lower %s.probe_rows.",
                settings.probe_rows,
                max(4, 2 * settings.probe_rows),
                self.name,
            )
        model = BridgeModel(backbone.model, eos_attends_to_b=settings.eos_attends_to_b)
        return stage_trainer(model, backbone.model, training_rows, collator, settings, context, probe)

    def samples(
        self, model: BridgeModel, collator: BridgeCollator, batch: Batch, rows: Sequence[Row]
    ) -> dict[str, Any]:
        """Return the masked tokens of a few rows, what the model fills in, and the mask of the first."""
        return bridge_samples(model, collator, batch, rows)
