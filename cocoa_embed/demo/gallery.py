"""Searches the indexed scenes by text, by image, by both, and through LlamaIndex."""

from collections.abc import Sequence
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


def answer_queries(indexer: QdrantIndexer, rows: Sequence[Row]) -> list[Search]:
    """Make three searches of each kind for ``rows``, images with captions that ``indexer`` holds.

    LlamaIndex searches for the same texts as the text search.
    """
    kinds = {"text → image": (True, False), "image → image": (False, True), "image + text → image": (True, True)}
    results = []
    for number, (title, (with_text, with_image)) in enumerate(kinds.items()):
        for row in rows[number * QUERIES_OF_A_KIND :][:QUERIES_OF_A_KIND]:
            text = row.positive.text if with_text else None
            image = Path(str(row.image)) if with_image else None
            found = indexer.search(text, image=image, limit=SHOWN_HITS)
            hits = [_hit(row, hit.path, hit.score, hit.caption) for hit in found]
            results.append(_result(title, row, hits, text, image))
    retriever = CocoaRetriever(indexer, similarity_top_k=SHOWN_HITS)
    for row in rows[:QUERIES_OF_A_KIND]:
        nodes = retriever.retrieve(QueryBundle(query_str=row.positive.text or ""))
        hits = [
            _hit(row, str(node.node.to_dict()["image_path"]), node.score or 0.0, node.node.metadata.get("caption", ""))
            for node in nodes
        ]
        results.append(_result("LlamaIndex: text → image", row, hits, row.positive.text, None))
    return results


def _hit(row: Row, path: str, score: float, caption: str) -> SearchHit:
    correct = Path(path).samefile(str(row.image))
    return SearchHit(image=data_uri(load_image(path)), score=score, caption=caption, correct=correct)


def _result(title: str, row: Row, hits: list[SearchHit], text: str | None, image: Path | None) -> Search:
    shown = None if image is None else data_uri(load_image(image))
    return Search(title=title, text=text, image=shown, hits=hits, expected=row.positive.text)
