import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fake_model import COLOURS, FakeModel, colour_image
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
def folder(folder: Path) -> Path:
    """The four images: green has 16 bits and transparency, blue is larger than the images that are sent."""
    (folder / "green.png").unlink()
    colour_image("green").convert("RGBA").save(folder / "green.tiff")
    colour_image("blue", (3000, 1500)).save(folder / "blue.png")
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("green.png", "green.tiff"))
    return folder


@pytest.fixture
def retriever(indexer: QdrantIndexer) -> CocoaRetriever:
    return CocoaRetriever(indexer, similarity_top_k=3)


def images_in(message: ChatMessage) -> list[Image.Image]:
    return [Image.open(block.resolve_image()) for block in message.blocks if isinstance(block, ImageBlock)]


def main_colour(image: Image.Image) -> str:
    pixel = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], pixel))


def test_the_language_model_gets_the_images_and_captions_and_then_the_question(
    rag: ModuleType, retriever: CocoaRetriever, llm: MockLLM
) -> None:
    llm.reply = "All of it is green [1]."
    given = rag.answer("what is green here?", retriever, llm)
    expected = retriever.retrieve("what is green here?")
    ((system, user),) = llm.prompts
    assert "[1]" in system.content
    assert [type(block) for block in user.blocks] == [TextBlock, ImageBlock] * 3 + [TextBlock]
    assert user.blocks[-1].text == "Question: what is green here?"
    for number, node in enumerate(expected, 1):
        text = user.blocks[2 * number - 2].text
        assert text == f"Image {number}:\n{node.node.get_content(MetadataMode.LLM).strip()}"
        assert node.node.text in text
        assert "CC0" in text
    seen = images_in(user)
    assert [main_colour(image) for image in seen] == [Path(node.node.image_path).stem for node in expected]
    assert {image.format for image in seen} == {"JPEG"}
    assert given == rag.Answer("All of it is green [1].", [node.node.image_path for node in expected], [1], [])
    assert Path(given.images[0]).name == "green.tiff"
    rag.answer("blue", retriever, llm)
    assert images_in(llm.prompts[-1][1])[0].size == (1024, 512), "a large image is sent smaller"


@pytest.mark.parametrize(
    ("said", "checked", "cited"),
    [
        ("[1] and [3].", "[1] and [3].", [1, 3]),
        ("[2][2]", "[2][2]", [2]),
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
    llm.reply = "[2]"
    given = rag.answer("red", retriever, llm)
    assert given.skipped == [f"{folder / 'red.png'}: does not exist"]
    assert len(given.images) == len(images_in(llm.prompts.pop()[1])) == 1
    assert given.text == "[2: no such image]"
    for file in folder.iterdir():
        file.unlink()
    given = rag.answer("red", retriever, llm)
    assert (given.text, given.images, len(given.skipped)) == (rag.NOTHING_FOUND, [], 2)
    retriever.score_threshold = 1.5
    assert rag.answer("red", retriever, llm) == rag.Answer(rag.NOTHING_FOUND, [], [], [])
    assert llm.prompts == []


def test_a_local_model_gets_the_images(
    rag: ModuleType, retriever: CocoaRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = rag.LocalModel(resolve_backbone("scene-captioner"), max_new_tokens=12)
    generate, asked = captioner.model.generate, []
    monkeypatch.setattr(captioner.model, "generate", lambda **inputs: asked.append(inputs) or generate(**inputs))
    given = rag.answer("red", retriever, captioner)
    (inputs,) = asked
    shown = [Image.open(rag.BytesIO(rag.as_jpeg(path))) for path in given.images]
    expected = captioner.processor.image_processor(shown, return_tensors="pt")
    assert inputs["image_grid_thw"].shape == (3, 3)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert given.text.strip()
    assert captioner.processor.decode(inputs["input_ids"][0]).count("a red field") == 1


def test_the_example_names_what_is_missing(rag: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit, match="some-model is not a folder; for a model at an endpoint set OPENAI_BASE_URL"):
        rag.main("model", "pictures", "a question", "some-model")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:9/v1")
    monkeypatch.setitem(sys.modules, "llama_index.llms.openai_like", None)
    with pytest.raises(SystemExit, match="run: pip install llama-index-llms-openai-like"):
        rag.connect("some-model")
