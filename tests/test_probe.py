from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cocoa_embed.attention import Block
from cocoa_embed.backbone import Backbone
from cocoa_embed.train.bridge import BridgeModel
from cocoa_embed.train.collators import Batch, BridgeCollator
from cocoa_embed.train.data import Item, Row
from cocoa_embed.train.probe import EosProbe, exchange_images, hold_out_rows


def image_rows(images: list[int]) -> list[Row]:
    return [
        Row(query=Item(image=Path(f"{image}.png")), positive=Item(text=f"caption {number}"), source=str(number))
        for number, image in enumerate(images)
    ]


@settings(deadline=None, max_examples=60)
@given(images=st.lists(st.integers(0, 9), max_size=20), count=st.integers(0, 6), texts=st.integers(0, 3))
def test_held_out_rows_share_no_image_with_the_others(images: list[int], count: int, texts: int) -> None:
    text = Row(query=Item(text="a"), positive=Item(text="b"), source="text")
    rows = [text] * texts + image_rows(images)
    held_out, kept = hold_out_rows(rows, count)
    assert not {row.image for row in held_out} & {row.image for row in kept}
    is_enough = count > 1 and len(set(images)) >= 2 * count
    assert len({row.image for row in held_out}) == len(held_out) == (count if is_enough else 0)
    assert all(row in rows for row in held_out)
    held_images = {row.image for row in held_out}
    assert kept == [row for row in rows if row.image not in held_images]


def test_too_few_images_are_all_kept_for_training() -> None:
    rows = image_rows([0, 1, 2, 0, 1, 2])
    assert hold_out_rows(rows, 2) == ([], rows)
    assert hold_out_rows(rows, 1) == ([], rows), "one image cannot be exchanged for another"


@settings(deadline=None, max_examples=60)
@given(count=st.integers(2, 9), reverse=st.lists(st.booleans(), min_size=9, max_size=9))
def test_every_row_gets_another_rows_image_and_keeps_its_text(count: int, reverse: list[bool]) -> None:
    rows = [
        row.reversed() if turned else row for row, turned in zip(image_rows(list(range(count))), reverse, strict=False)
    ]
    exchanged = exchange_images(rows)
    assert sorted(str(row.image) for row in exchanged) == sorted(str(row.image) for row in rows)
    for before, after in zip(rows, exchanged, strict=True):
        assert after.image != before.image
        assert after.with_image(before.image) == before


@pytest.fixture
def collator(tiny_backbone: Backbone) -> BridgeCollator:
    return BridgeCollator(tiny_backbone.processor, seed=0)


@pytest.fixture
def sized_rows(scene_rows: list[Row], tmp_path: Path) -> list[Row]:
    """Rows whose images all differ in size, as photographs may."""
    sizes = [(56, 56), (84, 56), (56, 84), (84, 84), (112, 56)]
    rows = []
    for row, size in zip(scene_rows, sizes, strict=False):
        path = tmp_path / f"{size[0]}x{size[1]}.png"
        Image.open(row.image).resize(size).save(path)
        rows.append(row.with_image(path))
    return rows


def test_the_same_tokens_are_hidden_before_the_right_image_and_before_another(
    collator: BridgeCollator, sized_rows: list[Row]
) -> None:
    probe = EosProbe(collator, sized_rows, batch_size=2)
    right, shuffled = probe.batches["accuracy_right_image"], probe.batches["accuracy_shuffled_image"]
    assert [len(batch["blocks"]) for batch in right] == [2, 2, 1]
    for one, other in zip(right, shuffled, strict=True):
        assert torch.equal(one["target_ids"], other["target_ids"])
        for row in range(len(one["blocks"])):
            of_b = [batch["hidden_tokens"][row][batch["blocks"][row] == Block.B] for batch in (one, other)]
            assert torch.equal(*of_b)
    grids = [torch.cat([batch["image_grid_thw"] for batch in batches]) for batches in (right, shuffled)]
    assert torch.equal(grids[0].roll(-1, dims=0), grids[1]), "no image is in its own place"
    assert (grids[0] != grids[1]).any()


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_restores_the_training_mode_and_takes_no_gradient(
    tiny_backbone: Backbone, collator: BridgeCollator, scene_rows: list[Row], training: bool
) -> None:
    model = BridgeModel(tiny_backbone.model).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    figures = EosProbe(collator, scene_rows[:8], batch_size=4)(model)
    assert modes == [(False, False)] * 4
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert figures.keys() == {"accuracy_right_image", "accuracy_shuffled_image"}
    assert all(isinstance(figure, float) for figure in figures.values())


def test_the_accuracy_is_that_of_all_rows_at_once(
    tiny_backbone: Backbone, collator: BridgeCollator, scene_rows: list[Row]
) -> None:
    model = BridgeModel(tiny_backbone.model).eval()
    rows = scene_rows[:7]
    for name, figure in EosProbe(collator, rows, batch_size=3)(model).items():
        probe = EosProbe(collator, rows, batch_size=3)
        hidden = sum(len(batch["target_ids"]) for batch in probe.batches[name])
        right = sum(
            int((model.predict(batch).argmax(dim=1) == batch["target_ids"]).sum()) for batch in probe.batches[name]
        )
        assert figure == pytest.approx(right / hidden)


class ReadsTheImage(torch.nn.Module):
    """Is right on the hidden tokens of rows whose image is one it knows with their text."""

    def __init__(self, known: list[Batch]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.known = {batch["pixel_values"].sum().item(): batch["target_ids"] for batch in known}

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        known = self.known[batch["pixel_values"].sum().item()]
        return {"hidden_token_accuracy": torch.tensor(float(torch.equal(known, batch["target_ids"])))}


def test_the_probe_tells_the_right_image_from_another(collator: BridgeCollator, scene_rows: list[Row]) -> None:
    probe = EosProbe(collator, scene_rows[:6], batch_size=1)
    figures = probe(ReadsTheImage(probe.batches["accuracy_right_image"]))
    assert figures == {"accuracy_right_image": 1.0, "accuracy_shuffled_image": 0.0}
