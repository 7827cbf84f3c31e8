import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms
from raw_images import adobe_rgb, encoded, gamma, heic, icc_profile, in_adobe_rgb, tiff_of

from cocoa_embed.images.colour_profile import MAX_PROFILE_BYTES, transform_to_srgb
from cocoa_embed.images.load import load_image

LEVELS = [0, 40, 90, 128, 200, 255]
SCENE = Image.fromarray(np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS), axis=-1).reshape(12, 18, 3).astype(np.uint8))
ADOBE = in_adobe_rgb(SCENE)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def difference(image: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.subtract(image, other, dtype=int)).max())


def with_profile(image: Image.Image, container: str, profile: bytes) -> bytes:
    if container == "HEIC":
        copy = image.copy()
        copy.info["icc_profile"] = profile
        return heic(copy)
    options: dict[str, dict[str, object]] = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    return encoded(image, container, icc_profile=profile, **options.get(container, {}))


@pytest.mark.parametrize("container", ["PNG", "TIFF", "WEBP", "AVIF", "JPEG"])
def test_a_scene_is_the_same_as_srgb_and_as_adobe_rgb(container: str) -> None:
    image, same = (each.resize((180, 120), Image.Resampling.NEAREST) for each in (ADOBE, SCENE))
    assert difference(image, same) > 20
    loaded = load_image(with_profile(image, container, adobe_rgb()))
    assert difference(loaded, same) <= (20 if container in ("JPEG", "AVIF") else 4)  # near black, a level is many
    assert np.abs(np.subtract(loaded, same, dtype=float)).mean() < 2
    assert "icc_profile" not in loaded.info


def test_transparency_and_palettes_have_their_colours_converted_too() -> None:
    alpha = ADOBE.copy()
    alpha.putalpha(Image.new("L", ADOBE.size, 255))
    assert difference(load_image(encoded(alpha, "PNG", icc_profile=adobe_rgb())), SCENE) <= 4
    palette = ADOBE.quantize(256, dither=Image.Dither.NONE)
    assert difference(palette.convert("RGB"), ADOBE) <= 2
    assert difference(load_image(encoded(palette, "PNG", icc_profile=adobe_rgb())), SCENE) <= 6


def test_an_image_of_pillow_is_converted_and_left_as_it_was() -> None:
    given = Image.open(BytesIO(encoded(ADOBE, "PNG", icc_profile=adobe_rgb())))
    assert difference(load_image(given), SCENE) <= 4
    assert difference(given, ADOBE) == 0


def test_grey_is_converted_by_the_gamma_of_its_profile() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    profile = icc_profile(b"GRAY", {b"kTRC": gamma(256)})
    linear = np.arange(256) / 255
    expected = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    for data in (encoded(grey, "PNG", icc_profile=profile), encoded(grey.convert("LA"), "PNG", icc_profile=profile)):
        loaded = np.asarray(load_image(data), dtype=float)
        assert np.abs(loaded[0] - expected[:, None]).max() <= 2


def test_inks_are_converted_by_their_profile() -> None:
    """Each combination of full inks is a given colour of Lab: all are grey here, which no simple formula gives."""
    lightness = [255 - 15 * number for number in range(16)]
    table = b"".join(bytes((level, 128, 128)) for level in lightness)
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    curves = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + curves * 4 + table + curves * 3
    profile = icc_profile(b"CMYK", {b"A2B0": lut, b"A2B1": lut})
    image = Image.new("CMYK", (4, 4), (255, 0, 255, 0))
    shown = load_image(encoded(image, "TIFF", icc_profile=profile)).getpixel((0, 0))
    assert max(shown) - min(shown) <= 3, "combination 10 of 16 is a grey, of lightness 105 of 255"
    assert 80 < shown[0] < 115
    assert load_image(encoded(image, "TIFF")).getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize(
    "profile",
    [
        *(b"no profile", adobe_rgb()[:140], adobe_rgb(MAX_PROFILE_BYTES + 4), SRGB),
        adobe_rgb().replace(b"RGB ", b"CMYK"),
        icc_profile(b"GRAY", {b"kTRC": gamma(256)}),
        adobe_rgb()[:200] + b"\xff" * 200,
        icc_profile(b"Lab ", {}),
    ],
)
def test_a_profile_that_is_broken_too_large_or_for_other_pixels_is_ignored(profile: bytes) -> None:
    for data in (
        encoded(SCENE, "PNG", icc_profile=profile),
        encoded(SCENE, "WEBP", lossless=True, icc_profile=profile),
    ):
        assert difference(load_image(data), SCENE) == 0


def test_a_profile_of_adobe_rgb_is_used_up_to_the_limit_and_one_of_srgb_costs_nothing() -> None:
    assert transform_to_srgb(adobe_rgb(), "RGB") is not None
    assert difference(load_image(encoded(ADOBE, "PNG", icc_profile=adobe_rgb(2**20))), SCENE) <= 4
    assert transform_to_srgb(SRGB, "RGB") is None


def test_lab_keeps_its_own_definition() -> None:
    red = tiff_of(np.array([[[136, 80, 67]]], dtype=np.uint8), 8)
    with Image.open(BytesIO(red)) as opened:
        opened.load()
        opened.info["icc_profile"] = adobe_rgb()
        assert load_image(opened).getpixel((0, 0)) == load_image(red).getpixel((0, 0))
