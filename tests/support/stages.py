"""Stages and their parts without a run, and a stage of another kind in one file: masked-LM on texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.template import eos_tokens
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import Example
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.stage_trainer import StageTrainer, stage_trainer
from cocoa_embed.train.loop.trainer import StageContext
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import Ratio, ReconstructionSettings, RunSettings, StageSettings
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.contrastive.model import as_sentence_transformer
from cocoa_embed.train.stages.losses import masked_token_loss
from cocoa_embed.train.stages.masking import mask_each, row_generators
from cocoa_embed.train.stages.moca.settings import MocaSettings
from cocoa_embed.train.stages.moca.stage import MocaCollator, MocaModel
from cocoa_embed.train.stages.reconstruction import (
    full_model_mask,
    last_hidden_states,
    masked_token_logits,
)
from cocoa_embed.train.stages.rendering import joined, render_items, replace_masked, text_tokens
from cocoa_embed.train.stages.stage import Stage
from cocoa_embed.train.stages.warmup.settings import WarmupSettings
from cocoa_embed.train.stages.warmup.stage import WarmupCollator, WarmupModel

AStage = TypeVar("AStage", bound=Stage[Any])


def alone(kind: type[AStage], settings: StageSettings, **run: Any) -> AStage:
    """Return a stage outside of a recipe."""
    return kind(kind.__name__.lower(), settings, RunSettings(name="test", backbone="none", **run))


def trainer_arguments(folder: Path, **values: Any) -> dict[str, Any]:
    """Return ``TrainingArguments`` of a stage of a few steps that saves nothing."""
    return {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **values,
    }


def warmup_collator(backbone: Backbone, **settings: Any) -> WarmupCollator:
    """Return the collator of stage 1, with seed 0."""
    return WarmupCollator(backbone.processor, 0, warmup_settings(**settings))


def warmup_model(backbone: Backbone, **settings: Any) -> WarmupModel:
    """Return the model of stage 1, for evaluation."""
    return WarmupModel(backbone.model, warmup_settings(**settings)).eval()


def warmup_settings(**settings: Any) -> WarmupSettings:
    """Return the settings of stage 1 for one step of two rows."""
    return WarmupSettings(steps=1, batch_size=2, **settings)


def moca_collator(backbone: Backbone, **settings: Any) -> MocaCollator:
    """Return the collator of MoCa's pre-training, with seed 0."""
    return MocaCollator(backbone.processor, 0, moca_settings(**settings))


def moca_model(backbone: Backbone, **settings: Any) -> MocaModel:
    """Return the model of MoCa's pre-training, for evaluation."""
    return MocaModel(backbone.model, moca_settings(**settings)).eval()


def moca_settings(**settings: Any) -> MocaSettings:
    """Return the settings of MoCa's pre-training for one step of two rows."""
    return MocaSettings(steps=1, batch_size=2, **settings)


def bridge_collator(backbone: Backbone, mask_ratio: float = 0.7) -> BridgeCollator:
    """Return the collator of stage 2, with seed 0."""
    return BridgeCollator(backbone.processor, 0, mask_ratio)


def bridge_model(backbone: Backbone, *, eos_attends_to_b: bool = True) -> BridgeModel:
    """Return the model of stage 2, for evaluation, with the weight of the penalty that recipes have."""
    count = len(eos_tokens(backbone.processor.tokenizer))
    return BridgeModel(
        backbone.model, eos_attends_to_b=eos_attends_to_b, eos_tokens=count, eos_similarity_weight=0.1
    ).eval()


def contrastive_model(backbone: Backbone, **run: Any) -> SentenceTransformer:
    """Return the model of stage 3 on the CPU, with settings of a run."""
    return as_sentence_transformer(backbone, RunSettings(name="test", backbone="none", **run)).to("cpu")


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Return the gradients of a loss, those of all weights in one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


class MaskedLanguageSettings(ReconstructionSettings):
    ratio: Ratio = 0.3


class MaskedLanguageModel(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = model

    def forward(self, totals: Mapping[str, float], **batch: Tensor) -> dict[str, Tensor]:
        mask = full_model_mask(self.backbone, batch["attention_mask"])
        logits = masked_token_logits(self.backbone, last_hidden_states(self.backbone, batch, mask), batch)
        return {"loss": masked_token_loss(logits, batch["target_ids"], total=totals["target_ids"])}


class MaskedLanguage(Stage[MaskedLanguageSettings]):
    def usable(self, rows: RowTable) -> np.ndarray:
        return rows.column("positive_text") > 0

    def collate(self, processor: ProcessorMixin, examples: list[Example]) -> Batch:
        batch = render_items(processor, [joined(row) for _, row in examples])
        generators = row_generators(self.run.seed, [draw for draw, _ in examples])
        masked = mask_each(text_tokens(batch, processor), self.settings.ratio, generators)
        return replace_masked(batch, masked, processor.tokenizer.mask_token_id)

    def sequences(self, example: Example, processor: ProcessorMixin) -> list[Batch]:
        return [self.collate(processor, [example])]

    def trainer(self, backbone: Backbone, rows: Sequence[Row], context: StageContext) -> StageTrainer:
        def collator(examples: list[Example]) -> Batch:
            return self.collate(backbone.processor, examples)

        return stage_trainer(
            MaskedLanguageModel(backbone.model), backbone.model, rows, collator, self.settings, context
        )


class LongerRecipe(Recipe):
    """The stages of the package and, by one line, another."""

    masked_language: Annotated[MaskedLanguageSettings | None, f"{__name__}:MaskedLanguage"] = None
