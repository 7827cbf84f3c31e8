from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cocoa_embed.backbone import Backbone
from cocoa_embed.train.bridge import BridgeModel
from cocoa_embed.train.collators import Batch, BridgeCollator
from cocoa_embed.train.data import Item, Row
from cocoa_embed.train.probe import EosProbe, hold_out_rows, shuffle_images

GRIDS = ([1, 2, 2], [1, 4, 2], [1, 2, 4], [1, 4, 4])
"""Sizes in raw patches; the second and third have as many, and are yet not of one size."""


def numbered_images(grids: list[list[int]]) -> Batch:
    """Return images whose every patch holds the image's number and its own."""
    patches = [
        torch.tensor([[image, patch] for patch in range(height * width)], dtype=torch.float32)
        for image, (_, height, width) in enumerate(grids)
    ]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


def split_images(batch: Batch) -> list[Tensor]:
    return list(batch["pixel_values"].split(batch["image_grid_thw"].prod(dim=1).tolist()))


@settings(deadline=None, max_examples=60)
@given(grids=st.lists(st.sampled_from(GRIDS), min_size=1, max_size=8))
def test_images_are_exchanged_within_their_size_alone(grids: list[list[int]]) -> None:
    batch = numbered_images(grids)
    before = batch["pixel_values"].clone()
    shuffled = shuffle_images(batch)
    assert torch.equal(batch["pixel_values"], before)
    sources = []
    for image, patches in enumerate(split_images(shuffled)):
        source = int(patches[0, 0])
        assert torch.equal(patches, split_images(batch)[source]), "an image moves as a whole"
        assert grids[source] == grids[image]
        assert (source != image) == (grids.count(grids[image]) > 1)
        sources.append(source)
    assert sorted(sources) == list(range(len(grids)))


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


@pytest.fixture
def batch(tiny_backbone: Backbone, scene_rows: list[Row]) -> Batch:
    return BridgeCollator(tiny_backbone.processor, seed=0)(list(enumerate(scene_rows[:8])))


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_restores_the_training_mode_and_takes_no_gradient(
    tiny_backbone: Backbone, batch: Batch, training: bool
) -> None:
    model = BridgeModel(tiny_backbone.model).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    figures = EosProbe(batch)(model)
    assert modes == [(False, False)] * 2
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert figures.keys() == {"accuracy_right_image", "accuracy_shuffled_image"}
    assert all(isinstance(figure, float) for figure in figures.values())


class ReadsTheImage(torch.nn.Module):
    """Is right on as many hidden tokens as there are images in their own places."""

    def __init__(self, right: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.right = right

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        places = batch["pixel_values"].view_as(self.right) == self.right
        return {"hidden_token_accuracy": places.flatten(1).all(dim=1).float().mean()}


def test_the_probe_tells_the_right_image_from_another() -> None:
    batch = numbered_images([GRIDS[0]] * 4)
    figures = EosProbe(batch)(ReadsTheImage(batch["pixel_values"].view(4, -1, 2)))
    assert figures == {"accuracy_right_image": 1.0, "accuracy_shuffled_image": 0.0}
