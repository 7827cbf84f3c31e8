"""Search an index with each image of a folder and with altered copies of it, and count how often it is the first hit.

    cocoa-embed index path/to/images --model cocoa-qwen2vl
    python examples/find_itself.py cocoa-qwen2vl path/to/images

The first command writes ./cocoa-index, the second reads it. Files with the same content are one point of the index, and
each of them counts as found if that point is the first hit.
"""

import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median

from PIL import Image

from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.images.find_files import find_images
from cocoa_embed.images.load import load_image
from cocoa_embed.integrations.qdrant import QdrantIndexer


def compressed(image: Image.Image) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return load_image(buffer)


def cropped(image: Image.Image) -> Image.Image:
    return image.crop((image.width // 20, image.height // 20, image.width * 19 // 20, image.height * 19 // 20))


def rotated(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.ROTATE_90)


ALTERATIONS: list[tuple[str, Callable[[Image.Image], Image.Image], bool]] = [
    ("unchanged", lambda image: image, False),
    ("JPEG of quality 30", compressed, False),
    ("half its size", lambda image: image.reduce(2), False),
    ("cropped by 5 % a side", cropped, False),
    ("rotated by 2 degrees", lambda image: image.rotate(2, Image.Resampling.BICUBIC), False),
    ("rotated by 90 degrees", rotated, False),
    ("... any_orientation", rotated, True),
]


def measure_margins(
    indexer: QdrantIndexer, paths: Sequence[Path], alter: Callable[[Image.Image], Image.Image], any_orientation: bool
) -> list[float | None]:
    """Return, for each readable file, by how much it leads the next hit if it is the first one; otherwise None."""
    margins = []
    for path in paths:
        try:
            hits = indexer.search(image=alter(load_image(path)), limit=2, any_orientation=any_orientation)
        except ImageError:
            continue  # the index has left it out, too
        files = {Path(file).resolve() for file in hits[0].payload["paths"]} if hits else set()
        behind = hits[0].score - hits[1].score if len(hits) > 1 else 1.0
        margins.append(behind if path.resolve() in files else None)
    return margins


def main(model: str, folder: str) -> None:
    paths = find_images([folder])
    with QdrantIndexer(model, path="cocoa-index") as indexer:
        for name, alter, any_orientation in ALTERATIONS:
            margins = measure_margins(indexer, paths, alter, any_orientation)
            found = [margin for margin in margins if margin is not None]
            ahead = f", ahead of the next by {median(found):.3f} in the median" if found else ""
            print(f"{name:22} {len(found)} of {len(margins)} files find themselves first{ahead}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except CocoaError as error:
        sys.exit(str(error))
