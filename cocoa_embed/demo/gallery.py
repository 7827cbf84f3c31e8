"""Ask the indexed scenes questions: by text, by image, by both, and through LlamaIndex."""

from collections.abc import Sequence
from pathlib import Path

from llama_index.core.schema import NodeWithScore, QueryBundle

from cocoa_embed.data.rows import Row
from cocoa_embed.images.load import load_image
from cocoa_embed.integrations.llama_index.embedding import CocoaRetriever
from cocoa_embed.integrations.qdrant.indexer import Hit as Found
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.report.content import Hit, QueryResult

SHOWN_HITS = 6
QUERIES_OF_A_KIND = 3


def answer_queries(indexer: QdrantIndexer, rows: Sequence[Row]) -> list[QueryResult]:
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


def _by_text(indexer: QdrantIndexer, row: Row) -> QueryResult:
    found = indexer.search(row.positive.text, limit=SHOWN_HITS)
    return _result("text → image", row, found, text=row.positive.text)


def _by_image(indexer: QdrantIndexer, row: Row) -> QueryResult:
    image = _file(row)
    found = indexer.search(image=image, limit=SHOWN_HITS)
    return _result("image → image", row, found, image=image)


def _by_both(indexer: QdrantIndexer, row: Row) -> QueryResult:
    image = _file(row)
    found = indexer.search(row.positive.text, image=image, limit=SHOWN_HITS)
    return _result("image + text → image", row, found, text=row.positive.text, image=image)


def _file(row: Row) -> Path | None:
    """Return a row's image; the demo's are files."""
    return row.image if isinstance(row.image, Path) else None


def _through_llama_index(retriever: CocoaRetriever, row: Row) -> QueryResult:
    nodes = retriever.retrieve(QueryBundle(query_str=row.positive.text or ""))
    return _result("LlamaIndex: text → image", row, [_as_found(node) for node in nodes], text=row.positive.text)


def _as_found(scored: NodeWithScore) -> Found:
    node = scored.node
    payload = {"caption": node.metadata.get("caption", "")}
    return Found(id=node.node_id, score=scored.score or 0.0, path=str(node.to_dict()["image_path"]), payload=payload)


def _result(
    title: str, row: Row, found: Sequence[Found], *, text: str | None = None, image: Path | None = None
) -> QueryResult:
    right = _file(row)
    hits = [
        Hit(
            image=load_image(hit.path),
            score=hit.score,
            caption=str(hit.payload.get("caption") or ""),
            correct=right is not None and Path(hit.path).samefile(right),
        )
        for hit in found
    ]
    return QueryResult(
        title=title,
        text=text,
        image=load_image(image) if image is not None else None,
        hits=hits,
        expected=row.positive.text,
    )
