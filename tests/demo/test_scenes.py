import random
from itertools import combinations, islice, product
from math import comb, dist
from pathlib import Path

import numpy as np
import pytest
from exported import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scene_captions import parse_caption

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
    sample_scene,
    split_of,
    write_image_folder,
)

CELL = IMAGE_SIZE // 2
NEAR = 12.0
"""Distance in RGB within which a pixel is of a colour; the palette's colours are further apart than twice that."""


def scenes_of(seed: int, split: Split, count: int) -> list[Scene]:
    return list(islice(distinct_scenes(random.Random(seed), split), count))


def one_object(shape: str, *, size: str = "large", colour: str = "blue", place: str = "top left") -> Scene:
    return Scene(background="white", objects=(SceneObject(size=size, colour=colour, shape=shape, place=place),))


def coloured(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return np.linalg.norm(np.asarray(image).astype(float) - np.array(colour), axis=-1) < NEAR


def cell(pixels: np.ndarray, place: str) -> np.ndarray:
    row, column = divmod(PLACES.index(place), 2)
    return pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


@st.composite
def any_scene(draw_value: st.DrawFn) -> Scene:
    places = draw_value(st.sampled_from([*combinations(PLACES, 2), *combinations(PLACES, 3)]))
    objects = tuple(
        SceneObject(
            size=draw_value(st.sampled_from(sorted(RADII))),
            colour=draw_value(st.sampled_from(sorted(COLOURS))),
            shape=draw_value(st.sampled_from(SHAPES)),
            place=place,
        )
        for place in places
    )
    return Scene(background=draw_value(st.sampled_from(sorted(BACKGROUNDS))), objects=objects)


def test_scenes_are_not_trivial() -> None:
    an_object = len(RADII) * len(COLOURS) * len(SHAPES)
    contents_possible = len(BACKGROUNDS) * sum(comb(len(PLACES), count) * an_object**count for count in (2, 3))
    assert contents_possible == 6_096_384 > 10_000
    sample = scenes_of(0, "train", 500)
    assert {len(scene.objects) for scene in sample} == {2, 3}
    for scene in sample:
        places = [PLACES.index(item.place) for item in scene.objects]
        assert places == sorted(set(places)), "each object has a cell of its own, in reading order"


def test_every_value_is_drawn() -> None:
    sample = scenes_of(0, "train", 500)
    objects = [item for scene in sample for item in scene.objects]
    assert {scene.background for scene in sample} == set(BACKGROUNDS)
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.size for item in objects} == set(RADII)
    assert {item.place for item in objects} == set(PLACES)


def test_train_and_held_out_scenes_of_any_seeds_share_no_content() -> None:
    train = {scene for seed in (0, 1, 2) for scene in scenes_of(seed, "train", 2000)}
    held_out = {scene for seed in (0, 1, 2) for scene in scenes_of(seed, "held-out", 300)}
    assert len(train) > 5000
    assert len(held_out) > 800
    assert not train & held_out
    assert {split_of(scene) for scene in train} == {"train"}
    assert {split_of(scene) for scene in held_out} == {"held-out"}


@settings(max_examples=30)
@given(any_scene())
def test_the_split_is_a_property_of_the_content(scene: Scene) -> None:
    copy = Scene(background=scene.background, objects=tuple(SceneObject(**vars(item)) for item in scene.objects))
    assert copy is not scene
    assert split_of(copy) == split_of(scene)


def test_the_ratio_of_held_out_scenes_is_the_documented_one() -> None:
    objects = product(RADII, COLOURS, SHAPES)
    grid = [
        Scene(background, (SceneObject(*first, "top left"), SceneObject("small", "red", "ring", place)))
        for background, first, place in product(BACKGROUNDS, objects, PLACES[1:])
    ]
    ratio = sum(split_of(scene) == "held-out" for scene in grid) / len(grid)
    assert len(grid) == 864
    assert ratio == pytest.approx(1 / HELD_OUT_RATIO, abs=0.03)


def test_distinct_scenes_never_repeat() -> None:
    sample = scenes_of(0, "held-out", 400)
    assert len(set(sample)) == len(sample)


def test_sampling_is_deterministic_by_seed() -> None:
    assert scenes_of(5, "train", 50) == scenes_of(5, "train", 50)
    assert scenes_of(5, "train", 50) != scenes_of(6, "train", 50)
    assert sample_scene(random.Random(5), "train") == scenes_of(5, "train", 1)[0]


@settings(max_examples=300)
@given(any_scene())
def test_every_wording_says_all_of_its_scene(scene: Scene) -> None:
    """What can be read back is complete, and no two scenes share it."""
    for caption in captions(scene):
        assert parse_caption(caption) == scene


@settings(max_examples=50)
@given(any_scene())
def test_the_wordings_of_a_scene_differ(scene: Scene) -> None:
    assert len(set(captions(scene))) == len(WORDINGS) >= 2


def test_the_palette_is_wide_enough_to_tell_colours_apart() -> None:
    palette = [*COLOURS.values(), *BACKGROUNDS.values()]
    assert min(dist(a, b) for a, b in combinations(palette, 2)) > 2 * NEAR


@settings(max_examples=60, deadline=None)
@given(scene=any_scene(), seed=st.integers(0, 1000))
def test_an_image_shows_each_object_where_the_scene_says(scene: Scene, seed: int) -> None:
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


@pytest.mark.parametrize("shape", SHAPES)
def test_large_covers_more_than_small(shape: str) -> None:
    areas = {
        size: coloured(draw(one_object(shape, size=size), random.Random(0)), COLOURS["blue"]).sum() for size in RADII
    }
    assert areas["large"] > 2 * areas["small"] > 0


def test_shapes_look_different() -> None:
    silhouettes = [coloured(draw(one_object(shape), random.Random(0)), COLOURS["blue"]).astype(int) for shape in SHAPES]
    assert min(abs(first - second).sum() for first, second in combinations(silhouettes, 2)) >= 15


def test_drawing_moves_an_object_a_little_and_only_with_its_generator() -> None:
    scene = one_object("square")
    first, again, other = (np.asarray(draw(scene, random.Random(seed))) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_shape_that_cannot_be_drawn_is_named() -> None:
    with pytest.raises(ValueError, match="'blob'; the shapes are circle, square"):
        draw(one_object("blob"), random.Random(0))


def test_a_written_folder_is_the_same_bytes_for_the_same_arguments(tmp_path: Path) -> None:
    for name, split, seed in (("a", "train", 1), ("b", "train", 1), ("c", "train", 2), ("d", "held-out", 1)):
        write_image_folder(tmp_path / name, split, 12, seed=seed)
    first, again, other_seed, other_split = (contents(tmp_path / name) for name in "abcd")
    assert len(first) == 13
    assert first == again
    for other in (other_seed, other_split):
        assert other.keys() == first.keys()
        assert all(other[name] != first[name] for name in first)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_written_folder_reads_back_as_distinct_scenes_of_its_split(tmp_path: Path, split: Split) -> None:
    write_image_folder(tmp_path / "scenes", split, 20, seed=3)
    found = read_metadata(find_metadata(tmp_path / "scenes"))
    lines = [{**row.columns, "path": row.path} for row in found if isinstance(row, DescribedImage)]
    assert [line["file_name"] for line in lines] == [f"{number:05d}.png" for number in range(20)]
    scenes = [parse_caption(line["text"]) for line in lines]
    assert len(set(scenes)) == 20
    for line, scene in zip(lines, scenes, strict=True):
        assert split_of(scene) == split
        assert line["captions"] == captions(scene)
        with Image.open(line["path"]) as image:
            for item in scene.objects:
                assert cell(coloured(image, COLOURS[item.colour]), item.place).sum() >= 15
    assert len({captions(scene).index(line["text"]) for line, scene in zip(lines, scenes, strict=True)}) > 1
