"""Convert an image of any Pillow mode to upright 8-bit RGB."""

import sys
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from cocoa_embed.images.colour_profile import apply, to_srgb
from cocoa_embed.images.transparency import PIXELS_AT_ONCE, over_background

ORIENTATION_TAG = 0x0112
THUMBNAIL_QUALITY = 80
"""JPEG quality, on Pillow's scale."""

FULL_SCALES = (1.0, 255.0, 65535.0)
"""The possible values of white in floats: the first that is large enough. Integers fill 16 bits."""

SWAPPED = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
"""Pillow's name of each byte order, and of the opposite one: read with that, the upper 8 bits are the lower ones."""

DARK = 64
"""An image whose 8-bit values are all below this holds at most 14 bits in 16."""


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if the EXIF data are missing or broken."""
    try:
        # Not the method of the image's own class: PNG's decodes the image.
        orientation = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - broken EXIF raises nearly anything, and the image itself is fine
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a new RGB image, turned upright by its EXIF orientation, without metadata.

    Metadata that stayed, such as the orientation, would be applied again by the next reader.
    """
    image.load()
    rgb = to_rgb(image)
    rgb.info = {}
    # Pillow turns the new image, as it may fail to rewrite the EXIF data of the given one.
    rgb.getexif()[ORIENTATION_TAG] = read_orientation(image)
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a new RGB image in sRGB: other depths scaled to 8 bits, transparency over a background that shows it."""
    pixels = grey_image(image) if image.mode == "F" or image.mode.startswith("I") else image
    if pixels.mode == "LAB":
        rgb = lab_to_rgb(pixels)
    else:
        rgb = over_background(pixels) if pixels.has_transparency_data else pixels.convert("RGB")
    return to_srgb(rgb, image)


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of mode LAB, for which Pillow needs a colour profile."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return apply(ImageCms.buildTransform(lab, srgb, "LAB", "RGB"), image)


def grey_image(image: Image.Image) -> Image.Image:
    """Return a 16-bit, 32-bit or float grey image with 8 bits, and with its transparency.

    :raises ValueError: If no value is finite.
    """
    pixels, is_inverted = np.asarray(image), False
    if isinstance(image, TiffImageFile):
        # Pillow does not convert these: 12 bits in the lower end of 16, unsigned values, and 0 as white.
        if image.tag_v2.get(BITSPERSAMPLE) == (12,):
            pixels = pixels << 4
        if (
            image.mode == "I"
            and image.tag_v2.get(BITSPERSAMPLE) == (32,)
            and image.tag_v2.get(SAMPLEFORMAT) in (None, (1,))
        ):
            pixels = pixels.view(np.uint32)
        is_inverted = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    levels = grey_to_8_bit(pixels)
    grey = Image.fromarray(255 - levels if is_inverted else levels)
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray((pixels != transparent).astype(np.uint8) * 255))
    return grey


def grey_to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Scale grey values to 8 bits, by ``grey_range``. Values that are not finite become black, infinity white.

    :param pixels: Array of shape ``(height, width)``.
    :return: Array of the same shape, uint8.
    :raises ValueError: If no value is finite.
    """
    darkest, brightest = grey_range(pixels)
    levels = np.empty(pixels.shape, np.uint8)
    rows = max(1, PIXELS_AT_ONCE // pixels.shape[1])
    for top in range(0, len(pixels), rows):
        band = (pixels[top : top + rows].astype(np.float64) - darkest) * (255 / (brightest - darkest))
        levels[top : top + rows] = np.nan_to_num(np.clip(band, 0, 255), nan=0)
    return levels


def grey_range(pixels: np.ndarray) -> tuple[float, float]:
    """Return the values that become black and white: 0 and a full scale, if that shows the picture.

    That range is wrong if values are outside of it, all in its lowest quarter (12 bits in 16), or within a 16th of it
    (temperatures, heights). Then the range of the values is used; a lowest or highest value far from all others, which
    marks missing measurements, gets a quarter of the range for itself.

    :raises ValueError: If no value is finite.
    """
    finite = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels
    if not finite.size:
        raise ValueError("no pixel value is finite")
    lowest, highest = float(finite.min()), float(finite.max())
    scales = FULL_SCALES if pixels.dtype.kind == "f" else FULL_SCALES[-1:]
    scale = next((scale for scale in scales if 0 <= lowest and highest <= scale), None)
    spread = highest - lowest
    # Of 16-bit integers the upper 8 bits are kept, as Pillow does with 16-bit colour channels.
    white = 65280 if scale and pixels.dtype.kind != "f" else scale
    if white and (spread == 0 or (highest >= white / 4 and not white / 256 <= spread < white / 16)):
        return 0, white
    if spread == 0:
        return lowest - abs(lowest), lowest + abs(lowest)
    inner = finite[(finite > lowest) & (finite < highest)]
    if inner.size:
        second, last = float(inner.min()), float(inner.max())
        if second - lowest > highest - second:
            lowest = second - (highest - second) / 3
        elif highest - last > last - lowest:
            highest = last + (last - lowest) / 3
    return lowest, highest


def has_deep_colours(image: ImageFile.ImageFile) -> bool:
    """Return whether an image that is not loaded yet has colour channels of 16 bits, and no transparent colour.

    Pillow keeps the upper 8 of them, which are black where the values are small.
    """
    if image.mode not in ("RGB", "RGBA") or "transparency" in image.info:
        return False
    return any(";16" in str(tile.args) for tile in image.tile)


def stretch_dark(image: Image.Image, again: ImageFile.ImageFile) -> None:
    """Scale the colours of a loaded image by the range of their values, as for grey images, if all are dark.

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


def draw_thumbnail(image: Image.Image, size: int) -> bytes:
    """Return a JPEG of an RGB image, its longer side at most ``size`` pixels; small images are not enlarged."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()
