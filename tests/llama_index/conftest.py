"""Four images of one colour each, and a collection in memory that holds them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_model import COLOURS, FakeModel, write_colours

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

    from cocoa_embed.integrations.llama_index import CocoaEmbedding
    from cocoa_embed.integrations.qdrant import QdrantIndexer


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Red, green, blue and yellow, each with a caption and the columns ``author`` and ``n``."""
    folder = tmp_path / "pictures"
    files = write_colours(folder, *COLOURS)
    rows = [
        {"file_name": f"{colour}.png", "text": f"a {colour} field", "author": colour[0], "n": n, "licence": "CC0"}
        for n, colour in enumerate(COLOURS)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return files


@pytest.fixture
def folder(files: list[str]) -> Path:
    return Path(files[0]).parent


@pytest.fixture
def client() -> "Iterator[QdrantClient]":
    from qdrant_client import QdrantClient

    client = QdrantClient(":memory:")
    yield client
    client.close()


@pytest.fixture
def embedding() -> "CocoaEmbedding":
    from cocoa_embed.integrations.llama_index import CocoaEmbedding

    return CocoaEmbedding("fake", model=FakeModel(), embed_batch_size=3)


@pytest.fixture
def indexer(client: "QdrantClient", embedding: "CocoaEmbedding", folder: Path) -> "QdrantIndexer":
    from cocoa_embed.integrations.qdrant import QdrantIndexer

    indexer = QdrantIndexer(embedding.encoder, client=client)
    indexer.index(folder, progress=False)
    return indexer
