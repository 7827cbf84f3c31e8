"""Composite images with transparency over white or, where that would hide the picture, over black or grey."""

import numpy as np
from PIL import Image

PIXELS_AT_ONCE = 2**20
"""Pixels that are composited at once: a whole image of 89 megapixels would take another gibibyte."""

SAMPLED_SIDE = 1024
"""The maximum number of rows and columns that are sampled to choose the background."""

BACKGROUNDS = (255, 0, 128)
"""White, which is the usual one, black, and grey for a picture in black and white."""

CONTRAST = 32
"""Levels of a channel by which a colour has to differ from a background to be seen."""

MOST_HIDDEN = 0.25
"""The largest fraction of a picture's outline that may be hidden."""


def over_background(image: Image.Image) -> Image.Image:
    """Return an image with transparency as RGB, over ``background``."""
    shade = background(image)
    rgb = Image.new("RGB", image.size)
    rows = max(1, PIXELS_AT_ONCE // image.width)
    for top in range(0, image.height, rows):
        rgba = to_rgba(image.crop((0, top, image.width, min(top + rows, image.height))))
        below = Image.new("RGBA", rgba.size, (shade, shade, shade))
        rgb.paste(Image.alpha_composite(below, rgba).convert("RGB"), (0, top))
    return rgb


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert an image of any mode with transparency to RGBA."""
    # Pillow converts La (premultiplied grey) to RGBA only by way of LA.
    return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")


def background(image: Image.Image) -> int:
    """Return the grey level of ``BACKGROUNDS`` on which an image's outline is visible: white, unless that hides it.

    The outline is where visible pixels meet transparent ones. An image that is nearly all opaque, such as a page with
    round corners, stays on white if there is more to it than its outline.
    """
    factor = -(-max(image.size) // SAMPLED_SIDE)
    size = -(-image.width // factor), -(-image.height // factor)
    pixels = np.asarray(to_rgba(image.resize(size, Image.Resampling.NEAREST)))
    colours, alpha = pixels[..., :3].astype(np.int16), pixels[..., 3]
    is_visible = (alpha > 0) & (alpha >= alpha.max() / 2)
    if not is_visible.any():
        return BACKGROUNDS[0]

    def hidden(shade: int, where: np.ndarray) -> float:
        return float((np.abs(colours[where] - shade).max(axis=-1) < CONTRAST).mean())

    if is_visible.mean() > 0.9 and hidden(BACKGROUNDS[0], is_visible) < 0.95:
        return BACKGROUNDS[0]
    inside = np.pad(is_visible, 1, constant_values=True)
    is_inside = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    outline = is_visible & ~is_inside
    where = outline if outline.any() else is_visible
    ratios = {shade: hidden(shade, where) for shade in BACKGROUNDS}
    return next((shade for shade, ratio in ratios.items() if ratio <= MOST_HIDDEN), min(ratios, key=ratios.__getitem__))
