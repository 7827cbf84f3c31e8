"""Convert the colours of an image from its ICC profile to sRGB."""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 2**20
"""Larger profiles are ignored; those of printing presses have up to about 2.7 MB."""

MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
"""The mode of the pixels that a profile is for, by the colour space in its header."""

UNSEEN = 2
"""A profile that changes no colour by more levels than this is taken for sRGB, like those of nearly all photographs."""

GREY_LEVELS = Image.frombytes("L", (256, 1), bytes(range(256)))

FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE
"""Without a cache, threads may share a transform."""


def to_srgb(rgb: Image.Image, source: Image.Image) -> Image.Image:
    """Return an RGB image in sRGB; profiles that are broken, too large or for other pixels are ignored.

    :param rgb: The image's pixels as RGB, which may be changed in place.
    :param source: The image as it was decoded, with its profile.
    """
    profile = source.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 128 < len(profile) <= MAX_PROFILE_BYTES:
        return rgb
    mode = MODES.get(profile[16:20])
    transform = None if mode is None else transform_to_srgb(profile, mode)
    if transform is None:
        return rgb
    if mode == "RGB" and source.mode not in ("CMYK", "LAB"):
        ImageCms.applyTransform(rgb, transform, inPlace=True)
        return rgb
    if mode == "CMYK" and source.mode == "CMYK":
        return apply(transform, source)
    # A grey image that is RGB by now has the same values in every channel.
    is_grey = source.mode in ("L", "LA", "La", "1", "F") or source.mode.startswith("I")
    return rgb.point(list(apply(transform, GREY_LEVELS).tobytes()[::3]) * 3) if mode == "L" and is_grey else rgb


def apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    """Return an image that is not RGB as RGB."""
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "it was not changed in place"
    return converted


@lru_cache(maxsize=16)
def transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None if it is broken, or would make no visible change."""
    try:
        source, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        # The approximation of a curve is coarse near black.
        flags = FLAGS | ImageCms.Flags.NOOPTIMIZE if mode == "L" else FLAGS
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", renderingIntent=intent, flags=flags)
        colours = sample(mode)
        change = np.abs(np.asarray(apply(transform, colours), int) - np.asarray(colours.convert("RGB"), int)).max()
    except Exception:  # noqa: BLE001 - a broken profile raises nearly anything, and the pixels themselves are fine
        return None
    return None if mode != "CMYK" and change <= UNSEEN else transform


def sample(mode: str) -> Image.Image:
    """Return an image of every mixture of nine levels of each channel."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    mixtures = np.stack(np.meshgrid(*[np.linspace(0, 255, 9, dtype=np.uint8)] * channels), axis=-1)
    return Image.frombytes(mode, (mixtures.size // channels, 1), mixtures.tobytes())
