import random
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, islice, product
from math import comb, dist
from pathlib import Path

import numpy as np
import pytest
from exported import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cocoa_embed.data.image_folder import DescribedImage, find_metadata, read_metadata
from cocoa_embed.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_RATIO,
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


GRAMMARS = (
    (r"(?P<objects>.*), (?P<background>[a-z]+) background", ", ", "{0} {1}"),
    (r"(?P<objects>.*) on (?P<background>[a-z]+)", " and ", "{0} at {1}"),
    (r"on (?P<background>[a-z]+): (?P<objects>.*)", ", ", "{0} in {1}"),
    (r"(?P<background>[a-z]+) picture; (?P<objects>.*)", "; ", "{1}: {0}"),
)
"""For each wording: the whole, what stands between objects, and one object with its place."""

OBJECT = r"(?P<size>small|large) (?P<colour>[a-z]+) (?P<shape>[a-z]+)"
PLACE = r"(?P<place>(?:top|bottom) (?:left|right))"


def parse_caption(caption: str) -> Scene:
    """Return the scene of a caption in any of the wordings: their inverse."""
    for whole, separator, one in GRAMMARS:
        if match := re.fullmatch(whole, caption):
            pattern = one.format(OBJECT, PLACE)
            found = [re.fullmatch(pattern, text) for text in match["objects"].split(separator)]
            if all(found):
                objects = tuple(SceneObject(**item.groupdict()) for item in found if item is not None)
                return Scene(match["background"], objects)
    raise AssertionError(f"no wording gives {caption!r}")


def scenes_of(seed: int, split: Split, count: int) -> list[Scene]:
    return list(islice(distinct_scenes(random.Random(seed), split), count))


def coloured(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return np.linalg.norm(np.asarray(image).astype(float) - np.array(colour), axis=-1) < NEAR


def cell(pixels: np.ndarray, place: str) -> np.ndarray:
    row, column = divmod(PLACES.index(place), 2)
    return pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


@st.composite
def any_scene(draw_value: st.DrawFn) -> Scene:
    def choose(values: Iterable[str]) -> str:
        return draw_value(st.sampled_from(sorted(values)))

    places = draw_value(st.sampled_from([*combinations(PLACES, 2), *combinations(PLACES, 3)]))
    objects = (SceneObject(choose(RADII), choose(COLOURS), choose(SHAPES), place) for place in places)
    return Scene(choose(BACKGROUNDS), tuple(objects))


def test_samples_have_all_values_and_are_distinct_and_deterministic() -> None:
    an_object = len(RADII) * len(COLOURS) * len(SHAPES)
    assert len(BACKGROUNDS) * sum(comb(len(PLACES), count) * an_object**count for count in (2, 3)) == 6_096_384
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


def test_one_scene_in_16_is_held_out() -> None:
    second = SceneObject("small", "red", "ring", "bottom right")
    objects = [SceneObject(*values) for values in product(RADII, COLOURS, SHAPES, PLACES[:3])]
    grid = [Scene(background, (each, second)) for background, each in product(BACKGROUNDS, objects)]
    ratio = sum(split_of(scene) == "held-out" for scene in grid) / len(grid)
    assert ratio == pytest.approx(1 / HELD_OUT_RATIO, abs=0.03)


@settings(max_examples=200)
@given(any_scene())
def test_every_wording_describes_its_scene_completely(scene: Scene) -> None:
    assert [parse_caption(caption) for caption in captions(scene)] == [scene] * len(WORDINGS)
    assert len(set(captions(scene))) == len(WORDINGS)


@settings(max_examples=60)
@given(scene=any_scene(), seed=st.integers(0, 1000))
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


def drawn(shape: str, size: str = "large", seed: int = 0) -> np.ndarray:
    """Return which pixels of a drawing of one object show it."""
    image = draw(Scene("white", (SceneObject(size, "blue", shape, "top left"),)), random.Random(seed))
    return coloured(image, COLOURS["blue"]).astype(int)


def test_shapes_and_sizes_look_different() -> None:
    large, small = ([drawn(shape, size) for shape in SHAPES] for size in ("large", "small"))
    assert min(abs(first - second).sum() for first, second in combinations(large, 2)) >= 15
    for more, less in zip(large, small, strict=True):
        assert more.sum() > 2 * less.sum() > 0


def test_drawing_moves_an_object_a_little_and_only_with_its_generator() -> None:
    first, again, other = (drawn("square", seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_written_folder_holds_distinct_scenes_of_its_split_and_the_same_bytes_for_the_same_arguments(
    tmp_path: Path, split: Split
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_image_folder(tmp_path / name, split, 20, seed)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    assert all(other[name] != first[name] for name in first)
    found = read_metadata(find_metadata(tmp_path / "a"))
    lines = [{**row.columns, "path": row.path} for row in found if isinstance(row, DescribedImage)]
    assert [line["file_name"] for line in lines] == [f"{number:05d}.png" for number in range(20)]
    scenes = {parse_caption(line["text"]): line for line in lines}
    assert len(scenes) == 20
    for scene, line in scenes.items():
        assert split_of(scene) == split
        assert line["captions"] == captions(scene)
        with Image.open(line["path"]) as image:
            for item in scene.objects:
                assert cell(coloured(image, COLOURS[item.colour]), item.place).sum() >= 15
    assert len({captions(scene).index(line["text"]) for scene, line in scenes.items()}) > 1
