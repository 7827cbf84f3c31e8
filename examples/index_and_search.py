"""Index a folder of images and search it by text, by image, and by both.

    python examples/index_and_search.py cocoa-qwen2vl path/to/images "a red circle"

The index stays in ./cocoa-index: a second run embeds only what is new.
"""

import sys

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant import QdrantIndexer


def main(model: str, folder: str, text: str) -> None:
    with QdrantIndexer(model, path="cocoa-index") as indexer:
        summary = indexer.index(folder)
        # Files with the same content are one point: the first is new, its copies update the point.
        print(
            f"{summary.indexed} new, {summary.replaced} replaced, {summary.updated} updated,"
            f" {summary.unchanged} unchanged, {len(summary.failed)} failed"
        )
        for failure in summary.failed:
            print(f"  {failure['path']}: {failure['reason']}")

        best = next((hit.path for hit in indexer.search(text, limit=1)), None)
        queries = {repr(text): (text, None)}
        if best is not None:
            queries |= {best: (None, best), f"{best} and {text!r} together": (text, best)}
        for title, query in queries.items():
            print(f"nearest to {title}:")
            for hit in indexer.search(*query, limit=3):
                copies = len(hit.payload["paths"]) - 1
                print(f"  {hit.score:.4f}  {hit.path}" + (f"  (and {copies} more with this content)" if copies else ""))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except CocoaError as error:
        sys.exit(str(error))
