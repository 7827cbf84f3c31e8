"""The same pixels from every lossless container, and every mode as RGB."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps
from raw_images import encoded, exif, heic, png_chunk, png_of, tiff_file, tiff_of

from cocoa_embed.errors import ImageError
from cocoa_embed.images.load import load_image
from cocoa_embed.images.to_rgb import over_white, upright_rgb

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (27, 21, 3), dtype=np.uint8)
"""Odd sides, so that tiles and the passes of interlacing do not fit."""

ALPHA = RNG.integers(0, 256, (27, 21, 4), dtype=np.uint8)
GREY = NOISE[:, :, :1]


def wide(samples: np.ndarray) -> np.ndarray:
    """Return samples of 16 bits whose upper 8 are the given ones, and whose lower 8 are not."""
    return (samples.astype(np.uint16) << 8) + RNG.integers(0, 256, samples.shape, dtype=np.uint16)


def image_of(samples: np.ndarray) -> Image.Image:
    return Image.fromarray(samples[:, :, 0] if samples.shape[2] == 1 else samples)


LOSSLESS: dict[str, Callable[[np.ndarray], bytes]] = {
    "png": lambda samples: encoded(image_of(samples), "PNG"),
    "bmp": lambda samples: encoded(image_of(samples), "BMP"),
    "webp": lambda samples: encoded(image_of(samples), "WEBP", lossless=True, exact=True),
    "jp2": lambda samples: encoded(image_of(samples), "JPEG2000", irreversible=False),
    "tga": lambda samples: encoded(image_of(samples), "TGA"),
    "ico": lambda samples: encoded(image_of(samples), "ICO", sizes=[(21, 27)]),
    "tiff": lambda samples: encoded(image_of(samples), "TIFF"),
    "heic": lambda samples: heic(image_of(samples)),
    **{
        f"tiff {name}": lambda samples, name=name: encoded(image_of(samples), "TIFF", compression=name)
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "tiff_lzma")
    },
}

SAME: dict[str, bytes] = {
    **{container: encode(NOISE) for container, encode in LOSSLESS.items()},
    "ppm": encoded(image_of(NOISE), "PPM"),
    "png, 16 bits": png_of(wide(NOISE), colour=2),
    **{
        f"tiff, order {order}, planes {planar}, {samples.itemsize} bytes": tiff_of(
            samples, 2, order=order, planar=planar
        )
        for order in "<>"
        for planar in (False, True)
        for samples in (NOISE, wide(NOISE))
    },
    "grey png, 16 bits": png_of(wide(GREY)[:, :, 0], colour=0),
    "grey png, 16 bits and alpha": png_of(np.dstack([wide(GREY), np.full_like(GREY, 65535, np.uint16)]), colour=4),
    "grey png, 16 bits of RGB": png_of(np.repeat(wide(GREY), 3, axis=2), colour=2),
    "grey tiff, 16 bits": tiff_of(wide(GREY), 1),
    "grey tiff, 16 bits, big-endian": tiff_of(wide(GREY), 1, order=">"),
    "grey tiff, 16 bits, white is 0": tiff_of(65535 - wide(GREY), 0),
    "grey tiff, 8 bits, white is 0": tiff_of(255 - GREY, 0),
    "grey tiff, floats to 1": tiff_of((GREY / 255).astype(np.float32), 1),
    "grey heic": heic(image_of(GREY), matrix_coefficients=1),
    "grey gif, animated": encoded(image_of(GREY), "GIF", save_all=True, append_images=[image_of(255 - GREY)]),
}


@pytest.mark.parametrize("container", SAME)
def test_the_same_pixels_come_out_of_every_lossless_container(container: str) -> None:
    expected = GREY.repeat(3, axis=2) if "grey" in container else NOISE
    # Floats do not have every level exactly.
    atol = 1 if "floats" in container else 0
    np.testing.assert_allclose(np.asarray(load_image(SAME[container]), dtype=int), expected.astype(int), atol=atol)


@pytest.mark.parametrize("container", sorted(LOSSLESS.keys() - {"bmp"}))  # Pillow writes BMP without transparency
def test_transparency_looks_the_same_in_every_container(container: str) -> None:
    np.testing.assert_array_equal(load_image(LOSSLESS[container](ALPHA)), over_white(image_of(ALPHA)))


def test_12_bits_fill_the_whole_range_and_floats_are_finite() -> None:
    with pytest.raises(ImageError, match="not finite"):
        load_image(tiff_of(np.full((2, 2, 1), np.nan, dtype=np.float32), 1))
    tags = {256: (3, [2]), 257: (3, [1]), 258: (3, [12]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])}
    loaded = load_image(tiff_file(tags, [b"\xff\xf8\x00"]))
    assert [loaded.getpixel((column, 0)) for column in (0, 1)] == [(255, 255, 255), (128, 128, 128)]


@pytest.mark.parametrize(
    ("samples", "colour", "depth", "transparent"),
    [
        (np.array([[0, 9]], dtype=np.uint8), 0, 4, struct.pack(">H", 9)),
        (np.array([[0, 99]], dtype=np.uint8), 0, 0, struct.pack(">H", 99)),
        (np.array([[0, 0x1234]], dtype=np.uint16), 0, 0, struct.pack(">H", 0x1234)),
        (np.array([[[0, 0, 0], [1, 2, 3]]], dtype=np.uint8), 2, 0, struct.pack(">HHH", 1, 2, 3)),
        (np.array([[[0, 0, 0], [257, 512, 769]]], dtype=np.uint16), 2, 0, struct.pack(">HHH", 257, 512, 769)),
    ],
)
def test_the_transparent_colour_of_a_png_is_white_at_every_depth(
    samples: np.ndarray, colour: int, depth: int, transparent: bytes
) -> None:
    loaded = load_image(png_of(samples, png_chunk(b"tRNS", transparent), colour=colour, depth=depth))
    assert [loaded.getpixel((column, 0)) for column in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_the_inverted_cmyk_of_adobe_has_the_right_colours() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encoded(ink, "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(np.subtract(load_image(data).getpixel((8, 8)), (255, 0, 0))).max() < 8
    assert load_image(encoded(ink, "TIFF")).getpixel((8, 8)) == (255, 0, 0)


def test_lab_is_converted_by_its_definition() -> None:
    red = load_image(tiff_of(np.array([[[136, 80, 67]]], dtype=np.uint8), 8)).getpixel((0, 0))
    assert np.abs(np.subtract(red, (255, 0, 0))).max() < 16


@pytest.mark.parametrize("mode", [*Image.MODES, "La", "PA", "RGBX", "RGBa", "LAB", "HSV", "I;16B", "I;16L"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    loaded = upright_rgb(Image.new(mode, (3, 2)))
    assert (loaded.mode, loaded.size) == ("RGB", (3, 2))


def test_transparency_is_composited_in_bands_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = over_white(image_of(ALPHA))
    monkeypatch.setattr("cocoa_embed.images.to_rgb.PIXELS_AT_ONCE", 50)
    np.testing.assert_array_equal(over_white(image_of(ALPHA)), at_once)
    palette = image_of(NOISE).quantize(5)
    palette.info["transparency"] = 2
    np.testing.assert_array_equal(over_white(palette), over_white(palette.convert("RGBA")))


def test_no_metadata_is_left_that_a_reader_would_apply_again() -> None:
    data = encoded(image_of(NOISE), "JPEG", exif=exif(6), icc_profile=b"profile", dpi=(72, 72))
    loaded = load_image(data)
    assert loaded.size == (27, 21)
    assert ImageOps.exif_transpose(loaded).size == (27, 21)
    assert not loaded.info
    assert type(loaded) is Image.Image
