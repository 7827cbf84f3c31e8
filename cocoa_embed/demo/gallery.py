"""Search the indexed scenes by text, by image, by both, and through LlamaIndex."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from llama_index.core.schema import QueryBundle

from cocoa_embed.data.rows import Row
from cocoa_embed.images.data_uri import data_uri
from cocoa_embed.images.load import load_image
from cocoa_embed.integrations.llama_index import CocoaRetriever
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.report.content import Search, SearchHit

SHOWN_HITS = 6
QUERIES_OF_A_KIND = 3

Hit = tuple[str, float, str]
"""Path, score and caption."""


def answer_queries(indexer: QdrantIndexer, rows: Sequence[Row]) -> list[Search]:
    """Run three searches of each kind for ``rows``, captioned images in the collection of ``indexer``.

    LlamaIndex searches for the same texts as the text search.
    """
    kinds = {"text → image": (True, False), "image → image": (False, True), "image + text → image": (True, True)}
    searches = []
    for number, (title, (with_text, with_image)) in enumerate(kinds.items()):
        for row in rows[number * QUERIES_OF_A_KIND :][:QUERIES_OF_A_KIND]:
            text = row.positive.text if with_text else None
            image = Path(str(row.image)) if with_image else None
            hits = indexer.search(text, image=image, limit=SHOWN_HITS)
            searches.append(_search(title, row, text, image, [(hit.path, hit.score, hit.caption) for hit in hits]))
    retriever = CocoaRetriever(indexer, similarity_top_k=SHOWN_HITS)
    for row in rows[:QUERIES_OF_A_KIND]:
        text = row.positive.text or ""
        found = [
            (str(node.node.to_dict()["image_path"]), node.score or 0.0, node.node.metadata.get("caption", ""))
            for node in retriever.retrieve(QueryBundle(text))
        ]
        searches.append(_search("LlamaIndex: text → image", row, text, None, found))
    return searches


def _search(title: str, row: Row, text: str | None, image: Path | None, hits: Iterable[Hit]) -> Search:
    found = [
        SearchHit(data_uri(load_image(path)), score, caption, correct=Path(path).samefile(str(row.image)))
        for path, score, caption in hits
    ]
    shown = None if image is None else data_uri(load_image(image))
    return Search(title, text, shown, found, expected=row.positive.text)
