"""Held-out scenes that are hard to distinguish: families of scenes that differ from the first in one attribute.

Among scenes drawn at random, any two attributes of a scene identify it. Here a model needs all of them, so that recall
stays below 1.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from cocoa_embed.demo.scenes import BACKGROUNDS, COLOURS, PLACES, RADII, SHAPES, Scene, distinct_scenes, split_of

FAMILY = 4
"""The number of scenes of a family."""


def families(generator: random.Random) -> Iterator[Scene]:
    """Yield distinct held-out scenes, family after family, endlessly."""
    seen: set[Scene] = set()
    for scene in distinct_scenes(generator, "held-out"):
        others = [other for other in variations(scene) if split_of(other) == "held-out" and other not in seen]
        if scene in seen or len(others) < FAMILY - 1:
            continue
        family = [scene, *generator.sample(others, FAMILY - 1)]
        seen.update(family)
        yield from family


def variations(scene: Scene) -> list[Scene]:
    """Return the scenes that differ in the background, or in the size, colour, shape or place of one object."""
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
