"""Held-out scenes that are hard to tell apart: each stands beside others that differ from it in one thing.

Among scenes drawn at random a model finds the right one by any two of its features. Here it has to have read all of
them, and there is room above what contrastive learning alone reaches.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from cocoa_embed.demo.scenes import BACKGROUNDS, COLOURS, PLACES, RADII, SHAPES, Scene, distinct_scenes, split_of

FAMILY = 4
"""Scenes of a family: one, and three that differ from it in one thing."""


def families(generator: random.Random) -> Iterator[Scene]:
    """Yield held-out scenes, family after family, for ever; none twice."""
    seen: set[Scene] = set()
    for scene in distinct_scenes(generator, "held-out"):
        others = [other for other in variations(scene) if split_of(other) == "held-out" and other not in seen]
        if scene in seen or len(others) < FAMILY - 1:
            continue
        family = [scene, *generator.sample(others, FAMILY - 1)]
        seen.update(family)
        yield from family


def variations(scene: Scene) -> list[Scene]:
    """Return the scenes with another background, or another size, colour, shape or place of one object."""
    found = [replace(scene, background=other) for other in BACKGROUNDS if other != scene.background]
    taken = {item.place for item in scene.objects}
    values = {
        "size": tuple(RADII),
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "place": tuple(place for place in PLACES if place not in taken),
    }
    for number, item in enumerate(scene.objects):
        for attribute, options in values.items():
            for option in options:
                if option != getattr(item, attribute):
                    objects = [*scene.objects]
                    objects[number] = replace(item, **{attribute: option})
                    objects.sort(key=lambda changed: PLACES.index(changed.place))
                    found.append(replace(scene, objects=tuple(objects)))
    return found
