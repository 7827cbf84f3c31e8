"""Convert an image of any Pillow mode to upright 8-bit RGB."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

ORIENTATION_TAG = 0x0112
THUMBNAIL_QUALITY = 80
"""JPEG quality, on Pillow's scale."""

PIXELS_AT_ONCE = 2**20
"""Pixels that are composited over white at once: a whole image of 89 megapixels would take another gibibyte."""


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
    """Return a new RGB image: 16-bit and float grey scaled to 8 bits, transparency composited over white."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(grey_levels(image)).convert("RGB")
    if image.mode == "LAB":
        return lab_to_rgb(image)
    return over_white(image) if image.has_transparency_data else image.convert("RGB")


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of mode LAB, for which Pillow needs a colour profile."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert rgb is not None
    return rgb


def over_white(image: Image.Image) -> Image.Image:
    """Composite an image with transparency over white."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, PIXELS_AT_ONCE // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        # Pillow converts La (premultiplied grey) to RGBA only by way of LA.
        rgba = band.convert("LA").convert("RGBA") if band.mode == "La" else band.convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), (0, top))
    return rgb


def grey_levels(image: Image.Image) -> np.ndarray:
    """Return the 8-bit grey levels of a 16-bit, 32-bit or float grey image; its transparent colour becomes white.

    :return: Array of shape ``(height, width)``, uint8.
    :raises ValueError: If a value is not finite.
    """
    pixels = np.asarray(image)
    levels = grey_to_8_bit(pixels)
    if isinstance(image, TiffImageFile):
        # Pillow leaves these as they are in the file: 12 bits in the lower end of 16, and white as 0.
        if image.tag_v2.get(BITSPERSAMPLE) == (12,):
            levels = grey_to_8_bit(pixels << 4)
        if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
            levels = 255 - levels
    transparent = image.info.get("transparency")
    return levels if transparent is None else np.where(pixels == transparent, np.uint8(255), levels)


def grey_to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Scale grey values to 8 bits: integers from 0 to 65535; floats from 0 to 1, 255 or 65535, judged by the largest.

    Integers keep their upper 8 bits, as Pillow does with 16-bit colour channels.

    :param pixels: Array of shape ``(height, width)``.
    :return: Array of the same shape, uint8.
    :raises ValueError: If a value is not finite.
    """
    if np.issubdtype(pixels.dtype, np.integer):
        return (np.clip(pixels, 0, 65535) >> 8).astype(np.uint8)
    if not np.isfinite(pixels).all():
        raise ValueError("a pixel value is not finite")
    largest = float(pixels.max())
    scale = 255 if largest <= 1 else 1 if largest <= 255 else 255 / 65535
    return np.clip(pixels * scale, 0, 255).astype(np.uint8)


def draw_thumbnail(image: Image.Image, size: int) -> bytes:
    """Return a JPEG of an RGB image, its longer side at most ``size`` pixels; small images are not enlarged."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()
