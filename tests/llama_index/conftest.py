"""Four images of one colour each, a collection in memory that holds them, and a fake language model."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_model import COLOURS, FakeModel, write_colours
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms import ChatMessage, ChatResponse, MockLLM
from qdrant_client import QdrantClient

from cocoa_embed.integrations.llama_index import CocoaEmbedding
from cocoa_embed.integrations.qdrant import QdrantIndexer


class FakeLLM(MockLLM):
    """A chat model for images that records its prompts and returns a fixed reply."""

    reply: str = "so it is"
    prompts: list[list[ChatMessage]] = Field(default_factory=list)

    def chat(self, messages: Sequence[ChatMessage], **_: Any) -> ChatResponse:
        self.prompts.append(list(messages))
        return ChatResponse(message=ChatMessage(role="assistant", content=self.reply))

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self.chat(messages, **kwargs)


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM(is_chat_model=True)


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
def client() -> Iterator[QdrantClient]:
    client = QdrantClient(":memory:")
    yield client
    client.close()


@pytest.fixture
def embedding() -> CocoaEmbedding:
    return CocoaEmbedding("fake", model=FakeModel(), embed_batch_size=3)


@pytest.fixture
def indexer(client: QdrantClient, embedding: CocoaEmbedding, folder: Path) -> QdrantIndexer:
    indexer = QdrantIndexer(embedding.encoder, client=client)
    indexer.index(folder, progress=False)
    return indexer
