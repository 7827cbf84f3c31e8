from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.evaluation.geometry import geometry
from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.bridge.collator import BridgeCollator, split_blocks
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.probe import EosProbe, GeometryProbe, hold_out_rows, pictured_rows, shuffle_images

NAMES = ["accuracy_matching_image", "accuracy_shuffled_image", "accuracy_no_image"]


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
    assert kept == [row for row in rows if row.image not in held_images], "what shares nothing with them stays"


@settings(deadline=None, max_examples=100)
@given(sides=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=20), count=st.integers(2, 5))
def test_no_image_of_a_held_out_row_is_trained_on_from_either_side(sides: list[tuple[int, int]], count: int) -> None:
    rows = [
        Row(query=Item(text="as in", image=Path(f"{one}.png")), positive=Item(image=Path(f"{two}.png")), source="row")
        for one, two in sides
    ]
    held_out, kept = hold_out_rows(rows, count)
    out_of_training = {image for row in held_out for image in row.images()}
    assert out_of_training.isdisjoint(image for row in kept for image in row.images())
    assert len({row.query.image for row in held_out}) == len(held_out)
    if held_out:
        assert len(held_out) == count <= len({image for row in kept for image in row.images()})
    else:
        assert kept == rows


@settings(deadline=None, max_examples=60)
@given(
    images=st.lists(st.none() | st.integers(0, 5), max_size=20),
    count=st.integers(0, 3),
    shared=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=20, max_size=20),
)
def test_no_text_row_with_a_source_or_a_text_of_a_held_out_image_is_trained_on(
    images: list[int | None], count: int, shared: list[tuple[int, int]]
) -> None:
    rows = [
        Row(
            query=Item(text=f"caption {text}") if image is None else Item(image=Path(f"{image}.png")),
            positive=Item(text=f"another {number}") if image is None else Item(text=f"caption {text}"),
            source=f"place {place}",
        )
        for number, (image, (place, text)) in enumerate(zip(images, shared, strict=False))
    ]
    held_out, kept = hold_out_rows(rows, count)
    of_images = [row for row in rows if row.image is not None and row.image in {row.image for row in held_out}]
    sources, texts = {row.source for row in of_images}, {row.positive.text for row in of_images}
    for row in rows:
        tells = row.image is None and (row.source in sources or row.query.text in texts)
        assert (row in kept) is not (row in of_images or tells)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(2, 9), reverse=st.lists(st.booleans(), min_size=9, max_size=9))
def test_every_row_gets_another_rows_image_and_keeps_its_text(count: int, reverse: list[bool]) -> None:
    rows = [
        row.reversed() if turned else row for row, turned in zip(image_rows(list(range(count))), reverse, strict=False)
    ]
    shuffled = shuffle_images(rows)
    assert sorted(str(row.image) for row in shuffled) == sorted(str(row.image) for row in rows)
    for before, after in zip(rows, shuffled, strict=True):
        assert after.image != before.image
        assert after.image is not None
        for old, new in zip(before.items(), after.items(), strict=True):
            assert new == Item(text=old.text, image=None if old.image is None else after.image)


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
        rows.append(replace(row, query=Item(image=path)))
    return rows


def test_the_same_tokens_are_masked_before_the_matching_image_and_before_another(
    collator: BridgeCollator, sized_rows: list[Row]
) -> None:
    probe = EosProbe(collator, sized_rows, batch_size=2)
    right, shuffled = probe.batches["accuracy_matching_image"], probe.batches["accuracy_shuffled_image"]
    assert [len(batch["blocks"]) for batch in right] == [2, 2, 1]
    for one, other in zip(right, shuffled, strict=True):
        assert torch.equal(one["target_ids"], other["target_ids"])
        for row in range(len(one["blocks"])):
            of_b = [batch["masked_tokens"][row][batch["blocks"][row] == Block.B] for batch in (one, other)]
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
    metrics = EosProbe(collator, scene_rows[:8], batch_size=4)(model)
    assert modes == [(False, False)] * 6
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(metrics) == NAMES
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_accuracy_is_that_of_all_rows_at_once(
    tiny_backbone: Backbone, collator: BridgeCollator, scene_rows: list[Row]
) -> None:
    model = BridgeModel(tiny_backbone.model).eval()
    rows = scene_rows[:7]
    for name, value in EosProbe(collator, rows, batch_size=3)(model).items():
        probe = EosProbe(collator, rows, batch_size=3)
        hidden = sum(len(batch["target_ids"]) for batch in probe.batches[name])
        right = sum(
            int((model.predict(batch).argmax(dim=1) == batch["target_ids"]).sum()) for batch in probe.batches[name]
        )
        assert value == pytest.approx(right / hidden)


class ReadsTheImage(torch.nn.Module):
    """Is right on the hidden tokens of rows whose image is one it knows with their text."""

    def __init__(self, known: list[Batch]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.known = {batch["pixel_values"].sum().item(): batch["target_ids"] for batch in known}

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        known = self.known[batch["pixel_values"].sum().item()]
        return {"masked_token_accuracy": torch.tensor(float(torch.equal(known, batch["target_ids"])))}


def test_the_probe_tells_the_matching_image_from_another(collator: BridgeCollator, scene_rows: list[Row]) -> None:
    probe = EosProbe(collator, scene_rows[:6], batch_size=1)
    metrics = probe(ReadsTheImage(probe.batches["accuracy_matching_image"]))
    assert metrics == {"accuracy_matching_image": 1.0, "accuracy_shuffled_image": 0.0, "accuracy_no_image": 1.0}


def test_no_image_is_the_right_batch_but_for_who_sees_the_visual_tokens(
    collator: BridgeCollator, sized_rows: list[Row]
) -> None:
    probe = EosProbe(collator, sized_rows, batch_size=2)
    for right, cut in zip(probe.batches["accuracy_matching_image"], probe.batches["accuracy_no_image"], strict=True):
        assert cut.keys() == right.keys()
        assert [name for name in right if not torch.equal(cut[name], right[name])] == ["blocks"]
        changed = cut["blocks"] != right["blocks"]
        assert torch.equal(changed, right["mm_token_type_ids"] == 1), "all visual tokens, and nothing else"
        assert (changed.sum(dim=1) > 1).all()
        assert (cut["blocks"][changed] == Block.PAD).all()


def test_a_row_with_an_image_on_either_side_gets_another_in_block_a(
    collator: BridgeCollator, scene_rows: list[Row]
) -> None:
    """Block A is made of the positive there, and ``Row.image`` is the query's."""
    rows = [
        Row(
            query=Item(image=row.image),
            positive=Item(text=row.positive.text, image=scene_rows[-1 - n].image),
            source="",
        )
        for n, row in enumerate(scene_rows[:4])
    ]
    assert {split_blocks(row)[0].image for row in rows}.isdisjoint(row.image for row in rows)
    for before, after in zip(rows, shuffle_images(rows), strict=True):
        assert split_blocks(after)[0].image != split_blocks(before)[0].image
        assert split_blocks(after)[1] == split_blocks(before)[1]


# Geometry


@settings(max_examples=60)
@given(images=st.lists(st.integers(0, 9), max_size=20), count=st.integers(0, 6), texts=st.integers(0, 3))
def test_the_first_rows_with_different_images_are_looked_at(images: list[int], count: int, texts: int) -> None:
    text = Row(query=Item(text="a"), positive=Item(text="b"), source="text")
    rows = [text] * texts + image_rows(images)
    found = pictured_rows(rows, count)
    firsts = [row for n, row in enumerate(image_rows(images)) if images[n] not in images[:n]][:count]
    assert found == (firsts if len(firsts) > 1 else [])


class Points(torch.nn.Module):
    """Looks embeddings up by the numbers that stand for items; they come at any length."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = torch.nn.Parameter(vectors)


def geometry_probe(rows: list[Row], batch_size: int, seen: list[Any] | None = None) -> GeometryProbe:
    """Embed the n-th query as vector n, and the n-th positive as vector n + 10."""
    numbers = {id(item): n + 10 * side for side in (0, 1) for n, row in enumerate(rows)
               for item in ((row.query, row.positive)[side],)}  # fmt: skip

    def collate(items: Sequence[Item], is_document: bool) -> dict[str, Any]:
        return {"numbers": torch.tensor([numbers[id(item)] for item in items]), "documents": is_document}

    def embed(model: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
        if seen is not None:
            seen.append((len(batch["numbers"]), batch["documents"], model.training, torch.is_grad_enabled()))
        assert isinstance(model, Points)
        return model.vectors[batch["numbers"]]

    return GeometryProbe(collate, embed, rows, batch_size)


@pytest.mark.parametrize("training", [True, False])
def test_the_geometry_is_that_of_all_pairs_at_once(training: bool) -> None:
    rows = image_rows(list(range(5)))
    rows[4] = Row(query=Item(text="a query of text"), positive=Item(text="its answer"), source="")
    vectors = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []
    model = Points(vectors).train(training)
    found = geometry_probe(rows, 2, seen)(model)
    unit = torch.nn.functional.normalize(vectors.double(), dim=1).numpy()
    has_image = np.array([True] * 4 + [False])
    expected = geometry(unit[:5], unit[10:15], first_has_image=has_image, second_has_image=has_image & False)
    assert found == pytest.approx(expected, rel=1e-6)
    assert list(found) == ["alignment", "uniformity", "modality_gap", "effective_rank"]
    assert seen == [(n, document, False, False) for document in (False, True) for n in (2, 2, 1)]
    assert model.training is training


def test_embeddings_that_are_not_finite_have_no_geometry() -> None:
    vectors = torch.ones(20, 6)
    rows = image_rows(list(range(3)))
    assert geometry_probe(rows, 2)(Points(vectors.clone()))
    vectors[11, 0] = torch.inf
    assert geometry_probe(rows, 2)(Points(vectors)) == {}
