"""The bridge's loss as a term of the contrastive stage."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import alone, bridge_collator, trainer_arguments
from torch import Tensor, nn

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.forward_inputs import HostInputs
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import Draw, numbered
from cocoa_embed.train.loop.batch_facts import FACTS
from cocoa_embed.train.loop.trainer import StageContext
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.contrastive.batches import PairBatches, pair_groups
from cocoa_embed.train.stages.contrastive.reconstruction_term import COLUMN, masked_column, prepare_head
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.contrastive.trainer import ContrastiveTrainer

BATCH, WEIGHT = 8, 0.3


def trainer_with(backbone: Backbone, rows: list[Row], folder: Path, weight: float) -> ContrastiveTrainer:
    settings = ContrastiveSettings(steps=2, batch_size=BATCH, directions="symmetric", reconstruction_weight=weight)
    stage = alone(Contrastive, settings)
    trainer = stage.trainer(backbone, RowTable.of(rows), StageContext(trainer_arguments(folder, max_steps=2)))
    trainer.model.eval()
    return trainer


def loss_of(trainer: ContrastiveTrainer, rows: int = BATCH) -> tuple[float, Tensor]:
    """Return the loss of the first rows, and its gradients."""
    batch = trainer.data_collator([{"row": number} for number in range(rows)])
    features, labels = trainer.collect_features({name: value for name, value in batch.items() if name != FACTS})
    trainer.model.zero_grad()
    value = trainer.loss(features, labels)
    value.backward()
    return value.item(), gradients(trainer.model)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


@pytest.mark.parametrize("tokens", [30, 10_000])
def test_the_loss_and_its_gradients_are_the_plain_sum(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path, tokens: int
) -> None:
    rows = scene_rows[:BATCH]
    rows[3] = replace(rows[3], query=Item("a scene"), positive=Item("the same scene in other words"))
    with_term, without = (trainer_with(tiny_backbone, rows, tmp_path, weight) for weight in (WEIGHT, 0))
    for trainer in (with_term, without):
        trainer.limits.texts = trainer.limits.images = tokens
    contrastive, slow = loss_of(without)
    bridge = BridgeModel(tiny_backbone.model, eos_attends_to_b=False).eval()
    batch = HostInputs(tiny_backbone.model.config).after(bridge_collator(tiny_backbone))(numbered(rows))
    bridge.zero_grad()
    reconstruction = bridge(**batch)["loss"] * WEIGHT
    reconstruction.backward()
    slow = slow + gradients(with_term.model)
    value, fast = loss_of(with_term)
    assert reconstruction.item() > 0.1
    assert value == pytest.approx(contrastive + reconstruction.item(), rel=1e-4)
    assert (fast - slow).abs().max() < 1e-4 * slow.abs().max()


def test_rows_without_a_text_have_no_part_in_it(tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path) -> None:
    images = [
        replace(row, positive=Item(images=scene_rows[9 + n].query.images)) for n, row in enumerate(scene_rows[:3])
    ]
    collator = bridge_collator(tiny_backbone)
    assert masked_column(collator, numbered(images)) == {}
    column = masked_column(collator, numbered([*images, *scene_rows[3:5]]))
    assert column[f"{COLUMN}_num_images_per_sample"].tolist() == [1, 1]
    assert ((column[f"{COLUMN}_masked_ids"] >= 0) <= (column[f"{COLUMN}_blocks"] == Block.B)).all()
    trainer = trainer_with(tiny_backbone, [*images, *scene_rows[3:8]], tmp_path, WEIGHT)
    assert loss_of(trainer, rows=3)[0] > 0


def test_a_row_is_masked_differently_in_each_epoch(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    rows = RowTable.of(scene_rows[:BATCH])
    groups = pair_groups(rows, ContrastiveSettings(steps=1, batch_size=BATCH, directions="symmetric"))
    epochs = list(islice(PairBatches(groups, BATCH, 4, 0, 1, turns=3, span=2 * BATCH), 4))
    assert [sorted(number // (2 * BATCH) for number in epoch) for epoch in epochs] == [
        [turn] * 8 for turn in (0, 1, 2, 0)
    ]
    assert [sorted(number % BATCH for number in epoch) for epoch in epochs] == [list(range(8))] * 4
    collator = bridge_collator(tiny_backbone)
    one, again, other = (masked_column(collator, [(Draw(0, turn), scene_rows[0])]) for turn in (0, 0, 2))
    masked: Any = [each[f"{COLUMN}_masked_ids"] >= 0 for each in (one, again, other)]
    assert torch.equal(masked[0], masked[1])
    assert not torch.equal(masked[0], masked[2])


def test_a_head_of_its_own_is_not_trained(tiny_backbone: Backbone) -> None:
    model = tiny_backbone.model
    head: Any = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    assert prepare_head(model).weight.requires_grad == is_tied
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert not prepare_head(model).weight.requires_grad
