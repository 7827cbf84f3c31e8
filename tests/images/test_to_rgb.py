"""The same pixels from every lossless container, and every mode as RGB."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps
from raw_images import encoded, exif, heic, png_chunk, png_of, tiff_file, tiff_of

from cocoa_embed.errors import ImageError
from cocoa_embed.images.load import load_image
from cocoa_embed.images.to_rgb import upright_rgb
from cocoa_embed.images.transparency import over_background

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
    np.testing.assert_array_equal(load_image(LOSSLESS[container](ALPHA)), over_background(image_of(ALPHA)))


def test_12_bits_fill_the_whole_range() -> None:
    tags = {256: (3, [2]), 257: (3, [1]), 258: (3, [12]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])}
    loaded = load_image(tiff_file(tags, [b"\xff\xf8\x00"]))
    assert [loaded.getpixel((column, 0)) for column in (0, 1)] == [(255, 255, 255), (128, 128, 128)]


def dark(levels: int) -> np.ndarray:
    """Return the noise in 16-bit samples that use only so many levels."""
    return (NOISE / 255 * (levels - 1)).astype(np.uint16)


@pytest.mark.parametrize("levels", [2**8, 2**12, 16_000])
def test_colours_in_the_lower_bits_fill_the_whole_range(levels: int) -> None:
    samples, opaque = dark(levels), np.full((*NOISE.shape[:2], 1), 65535, np.uint16)
    files = {"png": png_of(samples, colour=2), "png with alpha": png_of(np.dstack([samples, opaque]), colour=6)}
    for order, planar in ("<", False), (">", False), ("<", True), (">", True):
        files[f"tiff, order {order}, planes {planar}"] = tiff_of(samples, 2, order=order, planar=planar)
    for kind, data in files.items():
        np.testing.assert_allclose(load_image(data), NOISE, atol=1.5, err_msg=kind)


def test_colours_of_a_dark_picture_in_16_bits_that_are_all_one_stay_dark() -> None:
    assert load_image(png_of(np.full((3, 3, 3), 700, np.uint16), colour=2)).getpixel((1, 1)) == (2, 2, 2)


RAMP = np.linspace(0, 1, 27 * 21).reshape(27, 21, 1)
SCALED: dict[str, np.ndarray] = {
    "uint32, 70,000 to 1,070,000": (70_000 + RAMP * 1_000_000).astype(np.uint32),
    "uint32, beyond int32": (2**31 + RAMP * 2**31 * 0.99).astype(np.uint32),
    "int32, both signs": (RAMP * 4000 - 1024).astype(np.int32),
    "int16, both signs": (RAMP * 4000 - 1024).astype(np.int16),
    "uint16 of 12 bits": (RAMP * 4095).astype(np.uint16),
    "uint16 of 14 bits": (RAMP * 16000).astype(np.uint16),
    "uint16 of 8 bits": (RAMP * 255).astype(np.uint16),
    "uint16, temperatures": (29000 + RAMP * 2000).astype(np.uint16),
    "float, both signs": (RAMP - 0.5).astype(np.float32),
    "float, heights": (RAMP * 3000 - 400).astype(np.float32),
    "float, millions": (RAMP * 3e6).astype(np.float32),
    "float, small": (RAMP * 1e-3).astype(np.float32),
    "float, temperatures": (290 + RAMP * 20).astype(np.float32),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", SCALED)
def test_values_that_no_full_scale_shows_are_scaled_by_their_range(kind: str, order: str) -> None:
    expected = RAMP.repeat(3, axis=2) * 255
    if kind.startswith("uint32"):
        order = "<"  # Pillow reads no others
    np.testing.assert_allclose(load_image(tiff_of(SCALED[kind], 1, order=order)), expected, atol=1.5)
    if SCALED[kind].dtype == np.uint16 and order == "<":  # Pillow reads no others with white as 0
        np.testing.assert_allclose(load_image(tiff_of(SCALED[kind], 0)), 255 - expected, atol=1.5)


@pytest.mark.parametrize(
    ("kind", "factor"), [(np.uint16, 65535), (np.float32, 1.0), (np.float32, 255.0), (np.float32, 65535.0)]
)
@pytest.mark.parametrize("brightest", [0.4, 1.0])
def test_values_of_a_full_scale_keep_their_brightness(kind: type, factor: float, brightest: float) -> None:
    values = (RAMP * factor * brightest).astype(kind)
    np.testing.assert_allclose(load_image(tiff_of(values, 1)), RAMP.repeat(3, axis=2) * 255 * brightest, atol=1.5)


@pytest.mark.parametrize("kind", ["float, both signs", "float, heights", "int16, both signs", "int32, both signs"])
def test_markers_of_missing_measurements_leave_the_range_to_the_other_values(kind: str) -> None:
    values = SCALED[kind].copy()
    clean = np.asarray(load_image(tiff_of(values, 1)), dtype=int)
    is_float = values.dtype.kind == "f"
    missing = [np.nan, np.inf, -np.inf, -3.4e38] if is_float else [-32768]
    for value in missing:
        values[13, :3] = value
        levels = np.asarray(load_image(tiff_of(values, 1)), dtype=int)
        assert np.ptp(levels[:13]) > 80
        assert np.ptp(levels[14:]) > 80
        if not np.isfinite(value):
            np.testing.assert_array_equal(np.delete(levels, 13, axis=0), np.delete(clean, 13, axis=0))
    for constant in (500_000, -7) if is_float else (-7,):
        flat = load_image(tiff_of(np.full_like(values, constant), 1))
        assert flat.getcolors() == [(27 * 21, (127, 127, 127))]
    if is_float:
        with pytest.raises(ImageError, match="no pixel value is finite"):
            load_image(tiff_of(np.full_like(values, np.nan), 1))


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
def test_the_transparent_colour_of_a_png_is_the_background_at_every_depth(
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
    at_once = over_background(image_of(ALPHA))
    monkeypatch.setattr("cocoa_embed.images.transparency.PIXELS_AT_ONCE", 50)
    np.testing.assert_array_equal(over_background(image_of(ALPHA)), at_once)
    palette = image_of(NOISE).quantize(5)
    palette.info["transparency"] = 2
    np.testing.assert_array_equal(over_background(palette), over_background(palette.convert("RGBA")))


def test_no_metadata_is_left_that_a_reader_would_apply_again() -> None:
    data = encoded(image_of(NOISE), "JPEG", exif=exif(6), icc_profile=b"profile", dpi=(72, 72))
    loaded = load_image(data)
    assert loaded.size == (27, 21)
    assert ImageOps.exif_transpose(loaded).size == (27, 21)
    assert not loaded.info
    assert type(loaded) is Image.Image
