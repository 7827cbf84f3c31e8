"""Build a stage: its weights, what of them is trained, its trainer, and what is kept of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.train.data.lengths import row_lengths
from cocoa_embed.train.loop.arguments import stage_attention, training_arguments
from cocoa_embed.train.loop.stage_trainer import StageContext
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.plan.checks import Prepared
from cocoa_embed.train.plan.cost import StepCost, measure_matmul_flops
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import BridgeSection, ContrastiveSection, WarmupSection
from cocoa_embed.train.stages.bridge import bridge_trainer
from cocoa_embed.train.stages.collators import joined, render_items
from cocoa_embed.train.stages.contrastive import contrastive_trainer
from cocoa_embed.train.stages.warmup import warmup_trainer


@dataclass(frozen=True)
class BuiltStage:
    """A stage that is ready to train.

    :param save: Writes the trained weights to a folder; every process calls it, the first one writes.
    """

    trainer: CocoaTrainer
    save: Callable[[Path], None]


def build_stage(recipe: Recipe, stage: str, prepared: Prepared, *, start: Path | None, checkpoints: Path) -> BuiltStage:
    """Build a stage from the weights of the stage before it.

    :param start: The folder of the stage before; None for the recipe's backbone.
    :param checkpoints: Where the stage's checkpoints go.
    :raises CocoaError: If the weights cannot be loaded.
    """
    section = recipe.section(stage)
    if isinstance(section, ContrastiveSection):
        return _contrastive_stage(recipe, section, prepared, start, checkpoints)
    backbone = load_stage_backbone(recipe, str(start or recipe.backbone), stage)
    rows = prepared.rows[stage]
    context = _context(recipe, stage, prepared, backbone.model, backbone.processor, checkpoints)
    if isinstance(section, BridgeSection):
        trainer = bridge_trainer(backbone, rows.rows, section, context)
    elif isinstance(section, WarmupSection):
        trainer = warmup_trainer(backbone, rows.rows, section, context)
    else:
        raise TypeError(f"no trainer for a {type(section).__name__}")
    return BuiltStage(trainer, partial(_save_backbone, trainer, backbone, rows.rows))


def load_stage_backbone(recipe: Recipe, start: str, stage: str) -> Backbone:
    """Load the weights that a stage starts from.

    :raises CocoaError: If they cannot be used.
    """
    set_seed(recipe.seed)  # a mask token that needs a wider embedding matrix is drawn
    with PartialState().main_process_first():  # others find what the first has downloaded
        backbone = load_backbone(
            start,
            attn_implementation=stage_attention(recipe, stage),
            max_length=recipe.max_length,
            max_pixels=recipe.max_pixels,
            bidirectional=recipe.bidirectional,
        )
    _checkpoint_gradients(recipe, backbone.model)
    return backbone


def _contrastive_stage(
    recipe: Recipe, section: ContrastiveSection, prepared: Prepared, start: Path | None, checkpoints: Path
) -> BuiltStage:
    if start is None:
        start = checkpoints / "start"
        backbone = load_stage_backbone(recipe, recipe.backbone, "contrastive")
        if PartialState().is_main_process:
            backbone.save(start)
        PartialState().wait_for_everyone()
    set_seed(recipe.seed)
    model = build_sentence_transformer(
        start,
        prompts=recipe.prompts.model_dump(),
        attn_implementation=stage_attention(recipe, "contrastive"),
        bidirectional=recipe.bidirectional,
    )
    backbone_model = model[0].auto_model
    _checkpoint_gradients(recipe, backbone_model)
    context = _context(recipe, "contrastive", prepared, backbone_model, model.processor, checkpoints)
    trainer = contrastive_trainer(model, prepared.rows["contrastive"].rows, section, context)
    return BuiltStage(trainer, partial(_save_sentence_transformer, trainer, model, prepared.rows["contrastive"].rows))


def _context(
    recipe: Recipe,
    stage: str,
    prepared: Prepared,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    checkpoints: Path,
) -> StageContext:
    rows, sizes = prepared.rows[stage].rows, prepared.rows[stage].sizes
    is_measured = all(image in sizes for row in rows for image in row.images())
    dtype = torch.bfloat16 if recipe.mixed_precision == "bf16" else torch.float32
    return StageContext(
        arguments=training_arguments(
            recipe,
            stage,
            steps=prepared.steps[stage],
            folder=checkpoints,
            layers=sorted(model._no_split_modules),
            # The contrastive stage embeds texts and images in passes of their own.
            finds_unused=stage == "contrastive",
        ),
        seed=recipe.seed,
        lengths_of=partial(row_lengths, processor=processor, sizes=sizes) if is_measured else None,
        flops_of=StepCost.of(model.config, recipe.section(stage)),
        peak_flops=measure_matmul_flops(PartialState().device, dtype),
        prompts=recipe.prompts.model_dump(),
        known={"stage": stage, "recipe": recipe.model_dump(mode="json")},
    )


def _checkpoint_gradients(recipe: Recipe, model: PreTrainedModel) -> None:
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _save_backbone(trainer: CocoaTrainer, backbone: Backbone, rows: Sequence[Row], folder: Path) -> None:
    _merge_adapter(trainer, backbone.processor, rows)
    state = trainer.full_state()
    if not trainer.is_world_process_zero():
        return
    if state is not None:
        # Of tied weights the first name alone, as a model that is not sharded is saved.
        own = {name for name, _ in [*backbone.model.named_parameters(), *backbone.model.named_buffers()]}
        whole = {name.removeprefix("backbone."): value for name, value in state.items()}
        state = {name: value for name, value in whole.items() if name in own}
    backbone.model.save_pretrained(folder, state_dict=state)
    backbone.processor.save_pretrained(folder)


def _save_sentence_transformer(
    trainer: CocoaTrainer, model: SentenceTransformer, rows: Sequence[Row], folder: Path
) -> None:
    _merge_adapter(trainer, model.processor, rows)
    if trainer.is_world_process_zero():
        model.save(str(folder), create_model_card=False)


def _merge_adapter(trainer: CocoaTrainer, processor: ProcessorMixin, rows: Sequence[Row]) -> None:
    """Merge a stage's adapter, where it has one; the merge is checked on a row, with an image if any has one."""
    if trainer.adapter is None:
        return
    row = next((row for row in rows if row.image is not None), rows[0])
    batch = render_items(processor, [joined(row)])
    trainer.adapter.merge({name: values.to(trainer.adapter.model.device) for name, values in batch.items()})
