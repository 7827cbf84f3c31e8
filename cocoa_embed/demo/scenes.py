"""Draw scenes of coloured shapes and describe them: the demo's images and captions.

A scene is a background and two or three objects in different cells of a 2 x 2 grid. There are 6 096 384 scenes: all
choices of shape, colour, size and place of every object and of the background. A caption describes its scene
completely, in one of ``WORDINGS``.

The split of a scene depends only on its content (``split_of``), so that training sets and held-out sets of any seeds
have no scene in common.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

Split = Literal["train", "held-out"]
Point = tuple[float, float]

IMAGE_SIZE = 56
"""Side of a drawn scene in pixels: 2 x 2 cells of 28, each one visual token of Qwen2-VL."""

HELD_OUT_RATIO = 16
"""One scene in this many is held out."""

BACKGROUNDS = {"white": (246, 246, 242), "gray": (150, 152, 156), "black": (24, 24, 28), "pink": (246, 190, 205)}
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 90, 220),
    "yellow": (245, 205, 45),
    "purple": (130, 55, 170),
    "orange": (245, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII = {"small": 6.0, "large": 11.0}
PLACES = ("top left", "top right", "bottom left", "bottom right")

_CELL = IMAGE_SIZE / 2
_JITTER = 1.5
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """One object: keys of ``SHAPES``, ``COLOURS``, ``RADII`` and ``PLACES``."""

    size: str
    colour: str
    shape: str
    place: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and its objects in reading order."""

    background: str
    objects: tuple[SceneObject, ...]


def sample_scene(generator: random.Random, split: Split) -> Scene:
    """Return a random scene of two or three objects that belongs to ``split``."""
    while True:
        places = sorted(generator.sample(range(len(PLACES)), k=generator.choice((2, 3))))
        choice = generator.choice
        objects = tuple(
            SceneObject(choice(tuple(RADII)), choice(tuple(COLOURS)), choice(SHAPES), PLACES[place]) for place in places
        )
        scene = Scene(choice(tuple(BACKGROUNDS)), objects)
        if split_of(scene) == split:
            return scene


def distinct_scenes(generator: random.Random, split: Split) -> Iterator[Scene]:
    """Yield distinct scenes of ``split``, endlessly."""
    seen: set[Scene] = set()
    while True:
        scene = sample_scene(generator, split)
        if scene not in seen:
            seen.add(scene)
            yield scene


def split_of(scene: Scene) -> Split:
    """Return the split that ``scene`` belongs to, by the hash of its content."""
    content = json.dumps(asdict(scene), sort_keys=True).encode()
    held_out = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % HELD_OUT_RATIO == 0
    return "held-out" if held_out else "train"


def draw(scene: Scene, generator: random.Random) -> Image.Image:
    """Draw ``scene`` as an RGB image of 56 x 56 pixels; ``generator`` moves each object a little inside its cell."""
    scale = _SUPERSAMPLING
    canvas = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        row, column = divmod(PLACES.index(item.place), 2)
        x = (column + 0.5) * _CELL + generator.uniform(-_JITTER, _JITTER)
        y = (row + 0.5) * _CELL + generator.uniform(-_JITTER, _JITTER)
        _draw_shape(pen, item.shape, (x * scale, y * scale), RADII[item.size] * scale, COLOURS[item.colour])
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, centre: Point, radius: float, colour: tuple[int, int, int]
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(radius * 0.4))
    elif shape == "square":
        side = radius * 0.86
        pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif shape == "cross":
        arm = radius * 0.34
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    else:
        pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _CORNERS[shape]], fill=colour)


_CORNERS: dict[str, list[Point]] = {
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "star": [
        (0.0, -1.0), (0.26, -0.36), (0.95, -0.31), (0.43, 0.14), (0.59, 0.81),
        (0.0, 0.45), (-0.59, 0.81), (-0.43, 0.14), (-0.95, -0.31), (-0.26, -0.36),
    ],
}  # fmt: skip


WORDINGS = (
    ("{} {}", ", ", "{objects}, {background} background"),
    ("{} at {}", " and ", "{objects} on {background}"),
    ("{} in {}", ", ", "on {background}: {objects}"),
    ("{1}: {0}", "; ", "{background} picture; {objects}"),
)
"""The ways to describe a scene completely: the format of an object and its place, the separator, the whole."""


def captions(scene: Scene) -> list[str]:
    """Return the caption of ``scene`` in each of ``WORDINGS``, in their order."""
    return [
        whole.format(
            objects=separator.join(each.format(item, item.place) for item in scene.objects), background=scene.background
        )
        for each, separator, whole in WORDINGS
    ]


def write_image_folder(folder: Path, split: Split, count: int, seed: int) -> None:
    """Write ``count`` distinct scenes as an image folder (``write_scenes``).

    The same arguments give the same bytes.
    """
    generator = random.Random(f"{seed}/{split}")
    write_scenes(folder, islice(distinct_scenes(generator, split), count), generator)


def write_scenes(folder: Path, scenes: Iterable[Scene], generator: random.Random) -> None:
    """Write ``scenes`` as an image folder: ``00000.png``, ... and ``metadata.jsonl``.

    Each line of ``metadata.jsonl`` holds ``file_name``, ``text`` (one caption, the wording drawn at random) and
    ``captions`` (all of them).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for index, scene in enumerate(scenes):
            file_name = f"{index:05d}.png"
            draw(scene, generator).save(folder / file_name)
            wordings = captions(scene)
            row = {"file_name": file_name, "text": generator.choice(wordings), "captions": wordings}
            metadata.write(json.dumps(row) + "\n")
