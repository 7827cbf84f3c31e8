from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw
from raw_images import encoded, png_chunk, png_of

from cocoa_embed.images.load import load_image
from cocoa_embed.images.transparency import background, over_background

SIZE = (64, 64)
DISC, TRIANGLE = ("ellipse", [8, 8, 56, 56]), ("polygon", [32, 8, 56, 56, 8, 56])


def mask(shape: tuple[str, list[int]], size: tuple[int, int] = SIZE) -> Image.Image:
    alpha = Image.new("L", size)
    getattr(ImageDraw.Draw(alpha), shape[0])(shape[1], fill=255)
    return alpha


def drawing(shape: tuple[str, list[int]], colour: str) -> Image.Image:
    """Return a shape of one colour; the transparent pixels around it have the same."""
    image = Image.new("RGB", SIZE, colour)
    image.putalpha(mask(shape))
    return image


def sixteen_bits(image: Image.Image) -> bytes:
    return png_of(np.asarray(image).astype(np.uint16) * 257, colour=6)


def key_colour(image: Image.Image) -> bytes:
    """Return a grey PNG of 16 bits whose transparent colour is just beside that of the drawing."""
    grey = np.where(np.asarray(image.getchannel("A")) > 0, 65535, 65534).astype(np.uint16)
    return png_of(grey, png_chunk(b"tRNS", (65534).to_bytes(2, "big")), colour=0)


WRITERS: dict[str, Callable[[Image.Image], bytes]] = {
    "RGBA": lambda image: encoded(image, "PNG"),
    "LA": lambda image: encoded(image.convert("LA"), "PNG"),
    "palette": lambda image: encoded(image.quantize(4), "PNG"),
    "16 bits": sixteen_bits,
    "WEBP": lambda image: encoded(image, "WEBP", lossless=True, exact=True),
    "GIF": lambda image: encoded(image, "GIF"),
    "TIFF": lambda image: encoded(image, "TIFF"),
    "TIFF, LA": lambda image: encoded(image.convert("LA"), "TIFF"),
    "AVIF": lambda image: encoded(image, "AVIF", quality=100),
}


def contrast(data: bytes) -> float:
    return float(np.asarray(load_image(data).convert("L"), dtype=int).std())


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("colour", ["white", "black", "#f8f8f8", "#080808", "gray", "gold"])
def test_drawings_of_one_colour_are_seen_and_differ(writer: str, colour: str) -> None:
    disc, triangle = (WRITERS[writer](drawing(shape, colour)) for shape in (DISC, TRIANGLE))
    assert contrast(disc) > 25
    assert np.abs(np.subtract(load_image(disc), load_image(triangle), dtype=float)).mean() > 10


def test_a_transparent_colour_that_is_nearly_that_of_the_drawing_is_seen() -> None:
    disc, triangle = (key_colour(drawing(shape, "white")) for shape in (DISC, TRIANGLE))
    assert contrast(disc) > 100
    assert np.abs(np.subtract(load_image(disc), load_image(triangle), dtype=float)).mean() > 20


def test_the_background_is_the_first_on_which_an_outline_is_seen() -> None:
    half_white = drawing(DISC, "black")
    half_white.paste((255, 255, 255), (0, 0, 32, 64), mask(DISC).crop((0, 0, 32, 64)))
    outlined = drawing(DISC, "white")
    ImageDraw.Draw(outlined).ellipse([8, 8, 56, 56], outline="black", width=2)
    faint = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    faint.putalpha(mask(DISC).point(lambda level: level // 5))
    hole = Image.new("RGBA", SIZE, "white")
    hole.paste((255, 255, 255, 0), (30, 30, 34, 34))
    page = hole.copy()
    page.paste("black", (4, 4, 60, 12))
    chosen = {
        255: [drawing(DISC, "black"), drawing(DISC, "red"), drawing(DISC, "yellow"), outlined, page],
        0: [
            drawing(DISC, "white"),
            drawing(DISC, "#f0f0f0"),
            faint,
            hole,
            Image.new("RGBA", SIZE, (255, 255, 255, 99)),
        ],
        128: [half_white],
    }
    assert {shade: [background(image) for image in images] for shade, images in chosen.items()} == {
        shade: [shade] * len(images) for shade, images in chosen.items()
    }


def test_fully_transparent_or_opaque_images_are_over_white() -> None:
    assert over_background(Image.new("RGBA", SIZE, (9, 9, 9, 0))).getcolors() == [(64 * 64, (255, 255, 255))]
    white = Image.new("RGBA", SIZE, "white")
    assert over_background(white).getcolors() == [(64 * 64, (255, 255, 255))]


def test_a_large_drawing_is_judged_by_a_sample() -> None:
    large = Image.new("RGBA", (5000, 3), (255, 255, 255, 0))
    large.paste("white", (1000, 0, 4000, 3))
    assert background(large) == 0
