"""Stage 2: its trainer and its samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedConfig, ProcessorMixin

from cocoa_embed.data.rows import Row, shortened
from cocoa_embed.errors import UsageError
from cocoa_embed.evaluation.geometry import PAIR_RECALL
from cocoa_embed.model.attention import Block, bridge_mask, is_causal
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.forward_inputs import HostInputs
from cocoa_embed.train.data.broken_rows import unbroken
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import Example
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.stage_trainer import StageTrainer, stage_trainer
from cocoa_embed.train.loop.trainer import Probe, StageContext
from cocoa_embed.train.stages.bridge.collator import BridgeCollator, split_blocks
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.bridge.probe import (
    MATCHING_IMAGE,
    PROBE_METRICS,
    SHUFFLED_IMAGE,
    bridge_probe,
    hold_out_rows,
)
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.samples import shown_images, token_samples, token_texts
from cocoa_embed.train.stages.stage import Stage
from cocoa_embed.train.stages.vision_features import share_frozen_vision

SAMPLED_TEXTS = 64
"""How many rows of a subset have their texts compared."""


class Bridge(Stage[BridgeSettings]):
    """``[block A] <EOS> [block B]`` under the bridge mask, with most of block B masked."""

    fewest_steps = 500
    needs = "block B needs a text besides the instructions; caption their images"
    has_samples = True

    def check_backbone(self, config: PreTrainedConfig) -> None:
        """Check that the embedding is the state of ``<EOS>``.

        :raises UsageError: If it is not.
        """
        if self.run.pooling != "eos":
            raise UsageError(
                f"pooling={self.run.pooling} does not fit stage {self.name}, which teaches <EOS> alone to hold the "
                f"content; set pooling=eos, or leave the stage out with {self.name}=null."
            )

    @property
    def shown_metrics(self) -> Mapping[str, str]:
        """The metrics of held-out rows, or the accuracy on the batch if ``probe_rows`` is 0."""
        if not self.settings.probe_rows:
            return {"loss": "loss", "masked_token_accuracy": "accuracy"}
        return {
            "loss": "loss",
            MATCHING_IMAGE: "matching image",
            SHUFFLED_IMAGE: "shuffled",
            PAIR_RECALL: "recall",
        }

    def usable(self, rows: RowTable) -> np.ndarray:
        """Return which rows have a content text."""
        found: np.ndarray = rows.column("query_text") + rows.column("positive_text") > 0
        return found

    def held_out(self, rows: RowTable) -> tuple[np.ndarray, np.ndarray]:
        """Hold the probe's rows out of training, with every row that would leak them."""
        return hold_out_rows(rows, self.settings.probe_rows, self.run.seed)

    def row_warnings(self, rows: RowTable) -> list[str]:
        """Return a sentence each if too few images can be held out, no row is text only, or block B never changes."""
        warnings, count = self._same_texts(rows), self.settings.probe_rows
        if rows.column("image_id").all() and not rows.column("query_text").any():
            warnings.append(
                f"No row of stage {self.name} is text only, so <EOS> learns to carry images but not captions, which "
                "halved the recall of photographs by captions (docs/findings.md); give images several captions, such "
                f"as those of cocoa-embed caption --wordings 4, and set {self.name}.data.paraphrases=2."
            )
        if count == 1:
            warnings.append(
                f"{self.name}.probe_rows is 1, and one image cannot be shuffled, so what <EOS> carries is not "
                "measured; hold out 2 rows or more, or 0."
            )
        elif count and not len(self.held_out(rows)[0]):
            warnings.append(
                f"Stage {self.name} has too few images to hold {count} of them out of training (it takes "
                f"{max(4, 2 * count)}), so what <EOS> carries is not measured; lower {self.name}.probe_rows."
            )
        return warnings

    def _same_texts(self, rows: RowTable) -> list[str]:
        """Return a sentence for each subset whose rows all have the same block B, judged by a sample of them."""
        subset, warnings = rows.column("subset"), []
        for number, name in enumerate(rows.subsets):
            own = np.flatnonzero(subset == number)
            sample = rows.select(own[:: len(own) // SAMPLED_TEXTS + 1])
            texts = {split_blocks(row, self.settings.split)[1] for row in sample}
            if len(sample) > 1 and len(texts) == 1:
                warnings.append(
                    f"Block B of stage {self.name} is {shortened(texts.pop())} in all rows of {name}, and so says "
                    "nothing about an image; if it is an instruction, give it as one, or leave the subset out."
                )
        return warnings

    def collator(self, processor: ProcessorMixin) -> BridgeCollator:
        """Return the stage's collator."""
        return BridgeCollator(processor, self.run.seed, self.settings.mask_ratio, self.settings.split)

    def sequences(self, example: Example, processor: ProcessorMixin) -> list[Batch]:
        """Return the single sequence of the row."""
        return [self.collator(processor)([example])]

    def trainer(self, backbone: Backbone, rows: RowTable, context: StageContext) -> StageTrainer:
        """Return the trainer, with a probe on the rows held out."""
        settings, probe = self.settings, None
        collator = self.collator(backbone.processor)
        held_out, training_rows = map(rows.select, self.held_out(rows))
        if len(probe_rows := unbroken(held_out, context.on_bad_row)) > 1:
            size = settings.rows_at_once(settings.batch_size)
            measure = bridge_probe(collator, probe_rows, prompts=self.run.prompts.model_dump(), batch_size=size)
            probe = Probe(measure, settings.probe_steps, PROBE_METRICS)
        model = BridgeModel(
            backbone.model,
            eos_attends_to_b=settings.eos_attends_to_b,
            eos_tokens=self.run.eos_tokens,
            eos_similarity_weight=settings.eos_similarity_weight,
        )
        prepared = HostInputs(backbone.model.config).after(collator)
        trainer = stage_trainer(model, backbone.model, training_rows, prepared, settings, context, probe)
        if settings.freeze_vision:  # only now: ``stage_trainer`` may change the dtype of frozen weights
            share_frozen_vision(backbone.model, self.run, remembers=False)
        return trainer

    def samples(
        self, model: BridgeModel, processor: ProcessorMixin, batch: Batch, rows: Sequence[Row]
    ) -> dict[str, Any]:
        """Fill in the masked tokens of each row's block B, and return the attention mask of the first row.

        :returns: ``tokens`` (``token_samples``), and ``mask``: ``allowed`` (a string of 0 and 1 for each position that
            attends), ``labels`` and ``blocks`` ("A", "EOS" or "B"), each of L positions.
        """
        logits = model.predict(dict(send_to_device(batch, model.backbone.device)))
        geometry = family_of(model.backbone.config).geometry
        images = shown_images(batch, batch.get("pixel_values", torch.empty(0)), geometry, processor)
        length = int(batch["attention_mask"][0].sum())
        allowed = bridge_mask(batch["blocks"], eos_attends_to_b=model.eos_attends_to_b)
        if is_causal(model.backbone):
            allowed = allowed.tril()
        mask = {
            "allowed": ["".join(map(str, row)) for row in allowed[0, :length, :length].int().tolist()],
            "labels": token_texts(batch["input_ids"][0, :length], processor),
            "blocks": [
                Block.EOS.name if block == Block.UNSEEN else Block(block).name
                for block in batch["blocks"][0, :length].tolist()
            ],
        }
        return {"tokens": token_samples(batch, logits, processor, rows, images), "mask": mask}
