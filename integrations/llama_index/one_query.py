"""Search a collection several times by one query, which is embedded once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cocoa_embed.encode.encoder import ModelInput
from cocoa_embed.encode.vectors import unit
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.integrations.qdrant.searching.searcher import Searcher


class OneQuery(Searcher):
    """Searches the collection of an indexer by the mean of the embeddings of several texts, each with the image."""

    def __init__(self, indexer: QdrantIndexer, texts: Sequence[str]) -> None:
        """Name the collection and the texts.

        :param texts: The texts, in place of the one that ``search`` is given; none for an image alone.
        """
        self.store = indexer.store
        self._indexer = indexer
        self._texts = texts
        self._embedded: np.ndarray | None = None

    def _embed_queries(self, items: Sequence[ModelInput], vectors: int) -> np.ndarray:
        if self._embedded is None:
            (item,) = items
            inputs: list[ModelInput] = [{**item, "text": text} for text in self._texts]
            embedded = self._indexer._embed_queries(inputs or [item], vectors)
            self._embedded = embedded if len(embedded) == 1 else unit(embedded.mean(axis=0, keepdims=True))
        return self._embedded
