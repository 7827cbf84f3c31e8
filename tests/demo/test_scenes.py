import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice, product
from math import dist
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cocoa_embed.data.image_folder import find_metadata, read_metadata
from cocoa_embed.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    PLACES,
    RADII,
    SHAPES,
    WORDINGS,
    Scene,
    SceneObject,
    Split,
    captions,
    distinct_scenes,
    draw,
    split_of,
    write_image_folder,
)

CELL = IMAGE_SIZE // 2
NEAR = 12.0
"""Distance in RGB within which a pixel is of a colour; the palette's colours are further apart than twice that."""


def scenes_of(seed: int, split: Split, count: int) -> list[Scene]:
    return list(islice(distinct_scenes(random.Random(seed), split), count))


def coloured(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return np.linalg.norm(np.asarray(image).astype(float) - np.array(colour), axis=-1) < NEAR


def cell(pixels: np.ndarray, place: str) -> np.ndarray:
    row, column = divmod(PLACES.index(place), 2)
    return pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


def scenes() -> st.SearchStrategy[Scene]:
    """Any scene."""
    look = [st.sampled_from(sorted(values)) for values in (RADII, COLOURS, SHAPES)]
    places = st.sampled_from([*combinations(PLACES, 2), *combinations(PLACES, 3)])
    objects = places.flatmap(lambda where: st.tuples(*(st.builds(SceneObject, *look, st.just(at)) for at in where)))
    return st.builds(Scene, st.sampled_from(sorted(BACKGROUNDS)), objects)


def test_samples_have_all_values_and_are_distinct_and_deterministic() -> None:
    sample = scenes_of(5, "train", 500)
    assert len(set(sample)) == 500
    assert sample == scenes_of(5, "train", 500) != scenes_of(6, "train", 500)
    for scene in sample:
        places = [PLACES.index(item.place) for item in scene.objects]
        assert len(places) in (2, 3)
        assert places == sorted(set(places)), "each object has a cell of its own, in reading order"
    objects = [item for scene in sample for item in scene.objects]
    assert {scene.background for scene in sample} == set(BACKGROUNDS)
    for attribute, values in {"shape": SHAPES, "colour": COLOURS, "size": RADII, "place": PLACES}.items():
        assert {getattr(item, attribute) for item in objects} == set(values)


def test_train_and_held_out_scenes_of_any_seeds_are_disjoint() -> None:
    train = {scene for seed in (0, 1) for scene in scenes_of(seed, "train", 1000)}
    held_out = {scene for seed in (0, 1) for scene in scenes_of(seed, "held-out", 150)}
    assert not train & held_out
    # The split depends on the content alone.
    assert [{split_of(replace(scene)) for scene in scenes} for scenes in (train, held_out)] == [{"train"}, {"held-out"}]


def test_no_two_scenes_share_a_caption() -> None:
    """All scenes of two values of each attribute."""
    values = [tuple(each)[:2] for each in (RADII, COLOURS, SHAPES)]
    places = [*combinations(PLACES, 2), *combinations(PLACES, 3)]
    scenes = [
        Scene(background, tuple(SceneObject(*look, place) for look, place in zip(looks, where, strict=True)))
        for where in places
        for looks in product(product(*values), repeat=len(where))
        for background in tuple(BACKGROUNDS)[:2]
    ]
    assert len({caption for scene in scenes for caption in captions(scene)}) == len(scenes) * len(WORDINGS)


@settings(max_examples=60)
@given(scene=scenes(), seed=st.integers(0, 1000))
def test_an_image_shows_each_object_where_the_scene_says(scene: Scene, seed: int) -> None:
    palette = [*COLOURS.values(), *BACKGROUNDS.values()]
    assert min(dist(a, b) for a, b in combinations(palette, 2)) > 2 * NEAR, "the premise"
    image = draw(scene, random.Random(seed))
    assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    pixels = np.asarray(image)
    objects = {item.place: item for item in scene.objects}
    for place in PLACES:
        background = cell(coloured(image, BACKGROUNDS[scene.background]), place)
        exact = (cell(pixels, place) == BACKGROUNDS[scene.background]).all(axis=-1)
        if place not in objects:
            assert exact.all(), f"{place} is empty"
            continue
        border = np.ones_like(exact)
        border[1:-1, 1:-1] = False
        assert exact[border].all(), f"what is at {place} stays inside its cell"
        item = objects[place]
        shown = cell(coloured(image, COLOURS[item.colour]), place)
        centre = slice(CELL // 2 - 1, CELL // 2 + 1)
        assert shown.sum() >= 15, f"{item} is drawn at {place}"
        if item.shape == "ring":
            assert background[centre, centre].any(), "a ring is open in its middle"
        else:
            assert shown[centre, centre].any(), f"{item} fills its middle"
        others = [colour for name, colour in COLOURS.items() if name != item.colour]
        assert not any(cell(coloured(image, colour), place).sum() >= 15 for colour in others)


def test_shapes_and_sizes_look_different() -> None:
    objects = [SceneObject(size, "blue", shape, "top left") for size, shape in product(RADII, SHAPES)]
    pictures = {draw(Scene("white", (each,)), random.Random(0)).tobytes() for each in objects}
    assert len(pictures) == len(objects)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_folder_holds_scenes_of_its_split_with_their_captions_the_same_bytes_for_the_same_arguments(
    tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(*arguments: Any) -> Iterator[Scene]:
        for scene in distinct_scenes(*arguments):
            scenes.append(scene)
            yield scene

    scenes: list[Scene] = []
    monkeypatch.setattr("cocoa_embed.demo.scenes.distinct_scenes", watched)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_image_folder(tmp_path / name, split, 12, seed)
    assert {split_of(scene) for scene in scenes} == {split}
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    assert all(other[name] != first[name] for name in first)
    found = list(read_metadata(find_metadata(tmp_path / "a")))
    assert [row.columns["file_name"] for row in found] == [f"{number:05d}.png" for number in range(12)]
    assert [row.columns["captions"] for row in found] == list(map(captions, scenes[:12]))
    assert len({captions(scene).index(row.text) for scene, row in zip(scenes, found, strict=False)}) > 1
    for scene, row in zip(scenes, found, strict=False):
        with Image.open(row.path) as image:
            assert all(cell(coloured(image, COLOURS[each.colour]), each.place).sum() >= 15 for each in scene.objects)
