"""Read all 16 bits of colour channels, of which Pillow keeps the upper 8: they are black where the values are small."""

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from cocoa_embed.images.to_rgb import grey_to_8_bit

SWAPPED = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
"""Pillow's names of a byte order, and of the other one, in which the upper 8 bits are really the lower ones."""

DARK = 64
"""An image whose 8-bit values are all below holds 14 bits or fewer in 16."""


def has_deep_colours(image: ImageFile.ImageFile) -> bool:
    """Return whether an image that is not loaded yet has colour channels of 16 bits, and no transparent colour."""
    if image.mode not in ("RGB", "RGBA") or "transparency" in image.info:
        return False
    return any(";16" in each for tile in image.tile for each in raw_modes(tile))


def raw_modes(tile: Any) -> Iterable[str]:  # noqa: ANN401
    """Return the texts in a tile's arguments, of which the first is how its pixels are stored."""
    arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
    return [each for each in arguments if isinstance(each, str)]


def stretch_dark(image: Image.Image, again: ImageFile.ImageFile) -> None:
    """Scale the colours of a loaded image by the range of their values, as those of grey images, if all are dark.

    :param again: The same image, opened and not loaded.
    """
    upper = np.asarray(image)
    if upper[:, :, :3].max() >= DARK:
        return
    again.tile = [tile._replace(args=swapped(tile.args)) for tile in again.tile]
    again.load()
    colours = upper[:, :, :3].astype(np.uint16) << 8 | np.asarray(again)[:, :, :3]
    levels = grey_to_8_bit(colours.reshape(len(colours), -1)).reshape(colours.shape)
    image.paste(Image.fromarray(np.dstack([levels, upper[:, :, 3:]])))


def swapped(arguments: Any) -> Any:  # noqa: ANN401
    """Return the arguments of a tile with the other byte order."""
    if isinstance(arguments, tuple):
        return tuple(map(swapped, arguments))
    if isinstance(arguments, str) and ";16" in arguments:
        return arguments[:-4] + SWAPPED.get(arguments[-4:], arguments[-4:])
    return arguments
