"""Search an index with each image of a folder, and with altered copies of it: how many find the image first?

    python examples/find_itself.py cocoa-qwen2vl path/to/images

The images must have been indexed into ./cocoa-index (cocoa-embed index path/to/images --model cocoa-qwen2vl).
"""

import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from cocoa_embed.errors import CocoaError
from cocoa_embed.image_files import find_images
from cocoa_embed.images.load import load_image
from cocoa_embed.integrations.qdrant import QdrantIndexer


def compressed(image: Image.Image) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return load_image(buffer)


def cropped(image: Image.Image) -> Image.Image:
    return image.crop((image.width // 20, image.height // 20, image.width * 19 // 20, image.height * 19 // 20))


def turned(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.ROTATE_90)


LOOKS: list[tuple[str, Callable[[Image.Image], Image.Image], bool]] = [
    ("itself", lambda image: image, False),
    ("JPEG of quality 30", compressed, False),
    ("half its size", lambda image: image.reduce(2), False),
    ("cropped by 5 % a side", cropped, False),
    ("turned by 2 degrees", lambda image: image.rotate(2, Image.Resampling.BICUBIC), False),
    ("turned by 90 degrees", turned, False),
    ("... any_orientation", turned, True),
]


def main(model: str, folder: str) -> None:
    paths = find_images([folder])
    with QdrantIndexer(model, path=Path("cocoa-index")) as indexer:
        for name, alter, any_orientation in LOOKS:
            search = partial(indexer.search, limit=2, any_orientation=any_orientation)
            searches = [(path, search(image=alter(load_image(path)))) for path in paths]
            found = [hits for path, hits in searches if Path(hits[0].path).samefile(path)]
            margins = sorted(hits[0].score - hits[1].score for hits in found)
            margin = f", ahead of the next by {margins[len(margins) // 2]:.3f} in the median" if found else ""
            print(f"{name:22} {len(found)} of {len(paths)} find the image first{margin}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except CocoaError as error:
        sys.exit(str(error))
