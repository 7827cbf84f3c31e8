"""Index a folder of images and search it, by text and by image.

    python examples/index_and_search.py cocoa-qwen2vl path/to/images "a red circle"

The index stays in ./cocoa-index: a second run embeds only what is new.
"""

import sys
from pathlib import Path

from cocoa_embed.integrations.qdrant import Hit, QdrantIndexer


def show(title: str, hits: list[Hit]) -> None:
    print(title)
    for hit in hits:
        print(f"  {hit.score:.4f}  {hit.path}")


def main(model: str, folder: str, text: str) -> None:
    with QdrantIndexer(model, path=Path("cocoa-index")) as indexer:
        summary = indexer.index(folder)
        print(f"{summary.indexed} indexed, {summary.unchanged} unchanged, {len(summary.failed)} left out")
        for failure in summary.failed:
            print(f"  {failure['path']}: {failure['reason']}")

        by_text = indexer.search(text, limit=3)
        show(f"nearest to {text!r}:", by_text)
        best = Path(by_text[0].path)
        show(f"nearest to {best.name}:", indexer.search(image=best, limit=3))
        show(f"nearest to {best.name} and {text!r} together:", indexer.search(text, best, limit=3))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
