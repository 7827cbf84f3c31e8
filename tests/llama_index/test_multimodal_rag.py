import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fake_model import FakeModel, colour_image
from llama_index.core.llms import ChatMessage, ImageBlock, MockLLM, TextBlock
from llama_index.core.schema import MetadataMode
from PIL import Image
from qdrant_client import QdrantClient, models

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.integrations.llama_index import CocoaRetriever
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.model.backbone import resolve_backbone


@pytest.fixture(scope="module")
def rag() -> Iterator[ModuleType]:
    """The example, as a module."""
    examples = Path(__file__).parents[2] / "examples"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(examples))
        yield importlib.import_module("multimodal_rag")


@pytest.fixture
def retriever(indexer: QdrantIndexer) -> CocoaRetriever:
    return CocoaRetriever(indexer, similarity_top_k=3)


def images_in(message: ChatMessage) -> list[Image.Image]:
    return [Image.open(block.resolve_image()) for block in message.blocks if isinstance(block, ImageBlock)]


def test_the_language_model_gets_the_images_and_captions_and_then_the_question(
    rag: ModuleType, retriever: CocoaRetriever, folder: Path, llm: MockLLM
) -> None:
    colour_image("green", (3000, 1500)).save(folder / "green.png")
    llm.reply = "All of it is green [1]."
    given = rag.answer("what is green here?", retriever, llm)
    expected = [found.node for found in retriever.retrieve("what is green here?")]
    ((_, user),) = llm.prompts
    assert [type(block) for block in user.blocks] == [TextBlock, ImageBlock] * 3 + [TextBlock]
    texts = [block.text for block in user.blocks if isinstance(block, TextBlock)]
    shown = [node.get_content(MetadataMode.LLM).strip() for node in expected]
    assert texts == [*(f"Image {n}:\n{text}" for n, text in enumerate(shown, 1)), "Question: what is green here?"]
    assert "a green field" in texts[0]
    assert "CC0" in texts[0]
    assert [image.size for image in images_in(user)] == [(1024, 512), (24, 16), (24, 16)], (
        "a large image is sent smaller"
    )
    assert given == rag.Answer("All of it is green [1].", [node.image_path for node in expected], [1], [])


@pytest.mark.parametrize(
    ("said", "checked", "cited"),
    [
        ("[1] and [3].", "[1] and [3].", [1, 3]),
        ("[Image 2], [images 1,2]", "[2], [1][2]", [1, 2]),
        ("[0] [3, 17]", "[0: no such image] [3][17: no such image]", [3]),
        ("the year 2020 [sic] [a1] [-1]", "the year 2020 [sic] [a1] [-1]", []),
    ],
)
def test_only_images_that_were_shown_are_cited(rag: ModuleType, said: str, checked: str, cited: list[int]) -> None:
    assert rag.check_citations(said, 3) == (checked, cited)


def test_what_has_no_image_is_skipped_and_without_any_the_language_model_is_not_asked(
    rag: ModuleType, retriever: CocoaRetriever, client: QdrantClient, folder: Path, llm: MockLLM
) -> None:
    vector = Encoder(FakeModel()).embed_queries([{"text": "red"}])[0].tolist()
    client.upsert("images", points=[models.PointStruct(id=1, vector=vector, payload={"text": "a text"})])
    (folder / "red.png").unlink()
    given = rag.answer("red", retriever, llm)
    assert given.skipped == [f"{folder / 'red.png'}: does not exist"]
    assert len(given.images) == len(images_in(llm.prompts.pop()[1])) == 1
    retriever.score_threshold = 1.5
    assert rag.answer("red", retriever, llm) == rag.Answer(rag.NOTHING_FOUND, [], [], [])
    assert llm.prompts == []


def test_a_local_model_answers(rag: ModuleType, retriever: CocoaRetriever) -> None:
    captioner = rag.LocalModel(resolve_backbone("scene-captioner"), max_new_tokens=12)
    given = rag.answer("red", retriever, captioner)
    assert (bool(given.text.strip()), len(given.images)) == (True, 3)


def test_an_endpoint_that_is_not_set_is_named(rag: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit, match="some-model is not a folder; for a model at an endpoint set OPENAI_BASE_URL"):
        rag.main("model", "pictures", "a question", "some-model")
