"""Load the weights that a stage starts from, and save those that it ends with."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import send_to_device
from transformers import ProcessorMixin, set_seed

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.settings import RunSettings
from cocoa_embed.train.stages.rendering import joined, render_items


def load_weights(run: RunSettings, start: str, attn_implementation: str) -> Backbone:
    """Load the backbone that a stage starts from, by folder or by name.

    :raises CocoaError: If it cannot be used.
    """
    set_seed(run.seed)  # a mask token that needs a wider embedding matrix is drawn
    with PartialState().main_process_first():  # the others find what the first has downloaded
        backbone = load_backbone(
            start,
            attn_implementation=attn_implementation,
            max_length=run.max_length,
            max_pixels=run.max_pixels,
            bidirectional=run.bidirectional,
        )
    if run.gradient_checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    return backbone


def merge_adapter(trainer: CocoaTrainer, processor: ProcessorMixin, rows: Sequence[Row]) -> None:
    """Merge a stage's adapter, if it has one; the merge is checked on a row, with an image if any row has one."""
    if trainer.adapter is None:
        return
    row = next((row for row in rows if row.image is not None), rows[0])
    batch = render_items(processor, [joined(row)])
    trainer.adapter.merge(send_to_device(batch, trainer.adapter.model.device))


def save_backbone(trainer: CocoaTrainer, processor: ProcessorMixin, folder: Path) -> None:
    """Write the ``backbone`` of the trainer's model, gathered if it is sharded, with its processor."""
    model, state = trainer.accelerator.unwrap_model(trainer.model).backbone, trainer.full_state()
    if not trainer.is_world_process_zero():
        return
    if state is not None:
        # Of tied weights only the first name, as a model that is not sharded is saved.
        own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        gathered = {name.removeprefix("backbone."): value for name, value in state.items()}
        state = {name: value for name, value in gathered.items() if name in own}
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
