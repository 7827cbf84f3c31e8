"""The token that stands for an image in MMEB's texts, for training and for evaluation alike."""

import re

from cocoa_embed.errors import RowError

IMAGE_TOKEN = re.compile(r"\s*<\|image_1\|>\s*")
"""What stands where the image does; our template puts images first, so it goes, with the space around it."""

SHOWN_CHARACTERS = 60


def without_image_token(text: str, has_image: bool, place: str) -> str:
    """Return a text without the token that stands for its image, and without the space at its ends.

    :raises RowError: If the text has the token and there is no image.
    """
    if not has_image and IMAGE_TOKEN.search(text):
        raise RowError(place, f"{text[:SHOWN_CHARACTERS]!r} holds <|image_1|>, and there is no path of an image")
    return IMAGE_TOKEN.sub(" ", text).strip()
