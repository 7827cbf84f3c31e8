from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import PROMPTS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from run_records import ACCURACIES, GEOMETRY
from stages import bridge_collator, bridge_model
from torch import Tensor

from cocoa_embed.data.rows import Item, ItemImage, Row
from cocoa_embed.evaluation.geometry import geometry
from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.stages.bridge.collator import split_blocks
from cocoa_embed.train.stages.bridge.probe import (
    bridge_probe,
    eos_accuracies,
    eos_batches,
    hold_out_rows,
    shuffle_images,
)
from cocoa_embed.train.stages.probe import draw_images, geometry_probe, pictured_rows

TEXT = Row(query=Item(text="a"), positive=Item(text="b"), source="text")


def image_rows(images: Sequence[int]) -> list[Row]:
    return [
        Row(query=Item(images=(Path(f"{image}.png"),)), positive=Item(text=f"caption {number}"), source=str(number))
        for number, image in enumerate(images)
    ]


@st.composite
def tables(draw: st.DrawFn) -> RowTable:
    """Rows of few images, texts, sources and subsets; of texts alone, or with an image on either side or both."""
    texts = st.sampled_from("abc").map(lambda name: Item(text=f"caption {name}"))
    images = st.integers(0, 12).map(lambda name: Item(images=(Path(f"{name}.png"),)))
    side, source = texts | images, st.sampled_from("stuvw")
    return RowTable.of(draw(st.lists(st.builds(Row, side, side, source, subset=st.sampled_from("xy")), max_size=24)))


def images_of(rows: Iterable[Row]) -> set[ItemImage]:
    return {image for row in rows for image in row.images()}


@settings(max_examples=200)
@given(rows=tables(), count=st.integers(0, 4), seed=st.integers(0, 3))
def test_rows_of_different_images_are_held_out_and_nothing_that_leaks_them_is_trained_on(
    rows: RowTable, count: int, seed: int
) -> None:
    held_out, kept = (list(rows.select(places)) for places in hold_out_rows(rows, count, seed))
    if not held_out:
        assert kept == list(rows)
        return
    chosen = {row.image for row in held_out}
    assert len(chosen) == len(held_out) == count <= len({row.image for row in kept} - {None})
    leaking = [row for row in rows if row.image in chosen]
    sources = {row.source for row in leaking}
    texts = {item.text for row in leaking for item in row.items()} - {None}
    for row in rows:
        tells = row.source in sources or not texts.isdisjoint(item.text for item in row.items())
        leaks = tells if row.image is None else not images_of(leaking).isdisjoint(row.images())
        assert (row in kept) is not leaks


@settings(max_examples=100)
@given(images=st.lists(st.integers(0, 9), max_size=20), count=st.integers(0, 6), texts=st.integers(0, 3))
def test_the_first_images_of_one_subset_are_held_out_or_probed(images: list[int], count: int, texts: int) -> None:
    rows = RowTable.of([TEXT] * texts + image_rows(images))
    firsts = [row for n, row in enumerate(image_rows(images)) if images[n] not in images[:n]][:count]
    assert pictured_rows(rows, count, seed=0) == (firsts if len(firsts) > 1 else [])
    held_out = rows.select(hold_out_rows(rows, count, seed=0)[0])
    is_enough = count > 1 and len(set(images)) >= 2 * count
    assert {row.image for row in held_out} == ({row.image for row in firsts} if is_enough else set())


def test_images_of_several_subsets_are_drawn_by_the_seed_and_from_each_as_many() -> None:
    rows = RowTable.of([replace(row, subset="abc"[min(n // 20, 2)]) for n, row in enumerate(image_rows(range(43)))])
    found = [rows.select(draw_images(rows, 12, seed)) for seed in (0, 1, 0)]
    for drawn in found:
        counts = Counter(row.subset for row in drawn)
        assert (counts["c"], abs(counts["a"] - counts["b"]), len(images_of(drawn))) == (3, 1, 12)
    assert list(found[0]) == list(found[2]) != list(found[1])
    assert len({row.subset for row in rows.select(draw_images(rows, 2, seed=0))}) == 2
    assert len(draw_images(rows, 99, seed=0)) == 43


@settings(max_examples=60)
@given(sides=st.lists(st.sampled_from(["query", "positive", "both"]), min_size=2, max_size=9))
def test_a_shuffled_row_has_the_images_of_the_next_in_block_a_and_its_own_texts(sides: list[str]) -> None:
    rows = []
    for number, side in enumerate(sides):
        images = [(Path(f"{number}{name}.png"),) * (side in (name, "both")) for name in ("query", "positive")]
        rows.append(Row(Item("a ring", images[0], "find "), Item("red ring", images[1]), source=""))
    before, after = (list(map(split_blocks, each)) for each in (rows, shuffle_images(rows)))
    for (own, text), (block_a, block_b), (following, _) in zip(before, after, [*before[1:], before[0]], strict=True):
        assert (block_a, block_b) == (replace(own, images=following.images), text)


# The bridge's probe


def test_probe_batches_differ_only_in_the_image_or_in_who_attends_to_it(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path
) -> None:
    rows = []
    for row, size in zip(scene_rows, [(56, 56), (84, 56), (56, 84), (84, 84), (112, 56)], strict=False):
        path = tmp_path / f"{size[0]}x{size[1]}.png"
        Image.open(row.image).resize(size).save(path)
        rows.append(replace(row, query=Item(images=(path,))))
    matching, shuffled, without = eos_batches(bridge_collator(tiny_backbone), rows, batch_size=2).values()
    assert [len(batch["blocks"]) for batch in matching] == [2, 2, 1]
    for one, other, cut in zip(matching, shuffled, without, strict=True):
        assert torch.equal(one["target_ids"], other["target_ids"])
        for row in range(len(one["blocks"])):
            of_b = [batch["masked_tokens"][row][batch["blocks"][row] == Block.B] for batch in (one, other)]
            assert torch.equal(*of_b), "the same tokens are masked after any image"
        assert [name for name in one if not torch.equal(cut[name], one[name])] == ["blocks"]
        changed = cut["blocks"] != one["blocks"]
        assert torch.equal(changed, one["mm_token_type_ids"] == 1), "all visual tokens, and nothing else"
        assert (cut["blocks"][changed] == Block.PAD).all()
    grids = [torch.cat([batch["image_grid_thw"] for batch in batches]) for batches in (matching, shuffled)]
    assert torch.equal(grids[0].roll(-1, dims=0), grids[1]), "every image is in another row"


def test_accuracies_are_those_of_all_rows_at_once(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    model, batches = bridge_model(tiny_backbone), eos_batches(bridge_collator(tiny_backbone), scene_rows[:7], 3)
    with torch.no_grad():
        for name, accuracy in eos_accuracies(model, batches).items():
            correct = [model.predict(batch).argmax(dim=1) == batch["target_ids"] for batch in batches[name]]
            assert accuracy == pytest.approx(torch.cat(correct).float().mean().item())


@pytest.mark.parametrize("training", [True, False])
def test_a_probe_changes_no_weight_gradient_mode_or_random_draw(
    tiny_backbone: Backbone, scene_rows: list[Row], training: bool
) -> None:
    model = bridge_model(tiny_backbone).train(training)
    probe = bridge_probe(bridge_collator(tiny_backbone), scene_rows[:8], prompts=PROMPTS, batch_size=4)
    before, generators = {name: value.clone() for name, value in model.state_dict().items()}, random_state()
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    metrics = probe(model)
    assert tuple(metrics) == ACCURACIES + GEOMETRY
    assert set(modes) == {(False, False)}
    assert random_state() == generators
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def random_state() -> str:
    return f"{torch.get_rng_state().tolist()} {np.random.get_state()} {torch.is_grad_enabled()}"  # noqa: NPY002


# Geometry


def test_the_geometry_is_that_of_all_pairs_at_once_and_none_if_an_embedding_is_not_finite() -> None:
    """The n-th query has vector n, the n-th positive vector n + 10."""
    texts = [(Item(text=str(n)), Item(text=str(n + 10))) for n in range(5)]
    rows = [Row(replace(query, images=(Path("a.png"),) * (n < 4)), *rest, "") for n, (query, *rest) in enumerate(texts)]
    vectors = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []

    def collate(items: Sequence[Item], is_document: bool) -> dict[str, Any]:
        return {"numbers": torch.tensor([int(str(item.text)) for item in items]), "is_document": is_document}

    def embed(model: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
        seen.append((len(batch["numbers"]), batch["is_document"], model.training, torch.is_grad_enabled()))
        embeddings: Tensor = model(batch["numbers"])
        return embeddings

    probe = geometry_probe(collate, embed, rows, batch_size=2)
    found = probe(torch.nn.Embedding.from_pretrained(vectors))
    unit = torch.nn.functional.normalize(vectors.double(), dim=1).numpy()
    has_image = np.array([True] * 4 + [False])
    expected = geometry(unit[:5], unit[10:15], first_has_image=has_image, second_has_image=has_image & False)
    assert found == pytest.approx(expected, rel=1e-6)
    assert tuple(found) == GEOMETRY
    assert seen == [(n, document, False, False) for document in (False, True) for n in (2, 2, 1)]
    vectors[11, 0] = torch.inf
    assert probe(torch.nn.Embedding.from_pretrained(vectors)) == {}
