"""Search an index with each image of a folder: how many find themselves first?

    python examples/find_itself.py cocoa-qwen2vl path/to/images

The images must have been indexed into ./cocoa-index (cocoa-embed index path/to/images --model cocoa-qwen2vl).
"""

import sys
from pathlib import Path

from cocoa_embed.image_files import find_images
from cocoa_embed.integrations.qdrant import QdrantIndexer


def main(model: str, folder: str) -> None:
    images = find_images([folder])
    with QdrantIndexer(model, path=Path("cocoa-index")) as indexer:
        pairs = [(image, indexer.search(image=image, limit=2)) for image in images]
    itself = sum(Path(hits[0].path).samefile(image) for image, hits in pairs)
    margins = sorted(hits[0].score - hits[1].score for _, hits in pairs)
    print(f"{itself} of {len(images)} images find themselves first;")
    print(f"the next best is behind by {margins[0]:.4f} at least, by {margins[len(margins) // 2]:.4f} in the median")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
