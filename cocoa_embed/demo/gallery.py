"""Ask the indexed scenes questions: by text, by image, by both, and through LlamaIndex."""

from collections.abc import Sequence
from pathlib import Path

from llama_index.core.schema import NodeWithScore, QueryBundle

from cocoa_embed.images.data_uri import data_uri
from cocoa_embed.images.load import load_image
from cocoa_embed.integrations.llama_index.embedding import CocoaRetriever
from cocoa_embed.integrations.qdrant.indexer import Hit, QdrantIndexer
from cocoa_embed.report.content import Search, SearchHit
from cocoa_embed.train.data.rows import Row

SHOWN_HITS = 6
QUERIES_OF_A_KIND = 3


def answer_queries(indexer: QdrantIndexer, rows: Sequence[Row]) -> list[Search]:
    """Ask three questions of each kind about ``rows``, images with captions that ``indexer`` holds.

    LlamaIndex is asked the same as the text search.
    """
    kinds = iter(
        [rows[start : start + QUERIES_OF_A_KIND] for start in range(0, 3 * QUERIES_OF_A_KIND, QUERIES_OF_A_KIND)]
    )
    retriever = CocoaRetriever(indexer, similarity_top_k=SHOWN_HITS)
    return [
        *(_by_text(indexer, row) for row in next(kinds)),
        *(_by_image(indexer, row) for row in next(kinds)),
        *(_by_both(indexer, row) for row in next(kinds)),
        *(_through_llama_index(retriever, row) for row in rows[:QUERIES_OF_A_KIND]),
    ]


def _by_text(indexer: QdrantIndexer, row: Row) -> Search:
    found = indexer.search(row.positive.text, limit=SHOWN_HITS)
    return _result("text → image", row, found, text=row.positive.text)


def _by_image(indexer: QdrantIndexer, row: Row) -> Search:
    image = _file(row)
    found = indexer.search(image=image, limit=SHOWN_HITS)
    return _result("image → image", row, found, image=image)


def _by_both(indexer: QdrantIndexer, row: Row) -> Search:
    image = _file(row)
    found = indexer.search(row.positive.text, image=image, limit=SHOWN_HITS)
    return _result("image + text → image", row, found, text=row.positive.text, image=image)


def _file(row: Row) -> Path | None:
    """Return a row's image; the demo's are files."""
    return row.image if isinstance(row.image, Path) else None


def _through_llama_index(retriever: CocoaRetriever, row: Row) -> Search:
    nodes = retriever.retrieve(QueryBundle(query_str=row.positive.text or ""))
    return _result("LlamaIndex: text → image", row, [_as_found(node) for node in nodes], text=row.positive.text)


def _as_found(scored: NodeWithScore) -> Hit:
    node = scored.node
    payload = {"caption": node.metadata.get("caption", "")}
    return Hit(id=node.node_id, score=scored.score or 0.0, path=str(node.to_dict()["image_path"]), payload=payload)


def _result(
    title: str, row: Row, found: Sequence[Hit], *, text: str | None = None, image: Path | None = None
) -> Search:
    right = _file(row)
    hits = [
        SearchHit(
            image=data_uri(load_image(hit.path)),
            score=hit.score,
            caption=str(hit.payload.get("caption") or ""),
            correct=right is not None and Path(hit.path).samefile(right),
        )
        for hit in found
    ]
    return Search(
        title=title,
        text=text,
        image=None if image is None else data_uri(load_image(image)),
        hits=hits,
        expected=row.positive.text,
    )
