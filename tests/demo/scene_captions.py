"""The inverse of the demo's wordings: from a caption back to the scene it describes."""

import re

from cocoa_embed.demo.scenes import Scene, SceneObject

_OBJECT = r"(?P<size>small|large) (?P<colour>[a-z]+) (?P<shape>[a-z]+)"
_PLACE = r"(?P<place>(?:top|bottom) (?:left|right))"

_GRAMMARS = (
    (r"(?P<objects>.*), (?P<background>[a-z]+) background", ", ", rf"{_OBJECT} {_PLACE}"),
    (r"(?P<objects>.*) on (?P<background>[a-z]+)", " and ", rf"{_OBJECT} at {_PLACE}"),
    (r"on (?P<background>[a-z]+): (?P<objects>.*)", ", ", rf"{_OBJECT} in {_PLACE}"),
    (r"(?P<background>[a-z]+) picture; (?P<objects>.*)", "; ", rf"{_PLACE}: {_OBJECT}"),
)
"""For each wording, in the order of ``WORDINGS``: the whole, what stands between objects, and one object."""


def parse_caption(caption: str) -> Scene:
    """Return the scene of a caption in any of the wordings."""
    for whole, separator, one in _GRAMMARS:
        if match := re.fullmatch(whole, caption):
            found = [re.fullmatch(one, text) for text in match["objects"].split(separator)]
            if all(found):
                objects = tuple(SceneObject(**item.groupdict()) for item in found if item is not None)
                return Scene(background=match["background"], objects=objects)
    raise AssertionError(f"no wording gives {caption!r}")
