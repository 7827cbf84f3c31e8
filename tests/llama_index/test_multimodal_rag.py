import importlib.util
import math
import subprocess
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

SCRIPT = Path(__file__).parents[2] / "examples" / "multimodal_rag.py"


@pytest.fixture(scope="module")
def rag() -> Iterator[ModuleType]:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("multimodal_rag", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["multimodal_rag"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["multimodal_rag"]


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
    (system, user), *more = llm.prompts
    assert more == []
    assert "[1]" in system.content
    kinds = [type(block) for block in user.blocks]
    assert kinds == [TextBlock, ImageBlock] * 3 + [TextBlock]
    assert user.blocks[-1].text == "Question: what is green here?"
    for number, node in enumerate(expected, 1):
        text = user.blocks[2 * number - 2].text
        assert text.startswith(f"Image {number}:\n")
        assert node.node.get_content(MetadataMode.LLM).strip() in text
        assert node.node.text in text
        assert "CC0" in text
    seen = images_in(user)
    assert [main_colour(image) for image in seen] == [Path(node.node.image_path).stem for node in expected]
    assert {image.format for image in seen} == {"JPEG"}
    assert (given.text, given.cited, given.skipped) == ("All of it is green [1].", [1], [])
    assert given.images == [node.node.image_path for node in expected]
    assert Path(given.images[0]).name == "green.tiff"


def test_a_large_image_is_sent_smaller_and_a_citation_of_another_is_marked(
    rag: ModuleType, retriever: CocoaRetriever, llm: MockLLM
) -> None:
    llm.reply = "Blue [1], as in [9]."
    given = rag.answer("blue", retriever, llm)
    assert (given.text, given.cited) == ("Blue [1], as in [9: no such image].", [1])
    assert images_in(llm.prompts[0][1])[0].size == (1024, 512)


@pytest.mark.parametrize(
    ("said", "checked", "cited"),
    [
        ("none", "none", []),
        ("[1] and [3].", "[1] and [3].", [1, 3]),
        ("[2][2]", "[2][2]", [2]),
        ("[1, 3]", "[1][3]", [1, 3]),
        ("[Image 2], [images 1,2]", "[2], [1][2]", [1, 2]),
        ("[4]", "[4: no such image]", []),
        ("[0] [3, 17]", "[0: no such image] [3][17: no such image]", [3]),
        ("the year 2020 [sic] [a1] [-1]", "the year 2020 [sic] [a1] [-1]", []),
    ],
)
def test_only_images_that_were_shown_are_cited(rag: ModuleType, said: str, checked: str, cited: list[int]) -> None:
    assert rag.check_citations(said, 3) == (checked, cited)


def test_an_image_that_is_gone_is_skipped_with_its_reason(
    rag: ModuleType, retriever: CocoaRetriever, folder: Path, llm: MockLLM
) -> None:
    (folder / "red.png").unlink()
    llm.reply = "[3]"
    given = rag.answer("red", retriever, llm)
    assert given.skipped == [f"{folder / 'red.png'}: does not exist"]
    assert str(folder / "red.png") not in given.images
    assert len(given.images) == len(images_in(llm.prompts[0][1])) == 2
    assert given.text == "[3: no such image]"


def test_without_an_image_the_language_model_is_not_asked(
    rag: ModuleType, retriever: CocoaRetriever, folder: Path, llm: MockLLM
) -> None:
    retriever.score_threshold = 1.5
    assert rag.answer("red", retriever, llm) == rag.Answer(rag.NOTHING_FOUND, [], [], [])
    retriever.score_threshold = None
    for file in folder.iterdir():
        file.unlink()
    given = rag.answer("red", retriever, llm)
    assert (given.text, given.images, len(given.skipped)) == (rag.NOTHING_FOUND, [], 3)
    assert llm.prompts == []


def test_points_without_an_image_are_skipped(
    rag: ModuleType, retriever: CocoaRetriever, client: QdrantClient, llm: MockLLM
) -> None:
    vector = Encoder(FakeModel()).embed_queries([{"text": "red"}])[0].tolist()
    client.upsert("images", points=[models.PointStruct(id=1, vector=vector, payload={"text": "a text"})])
    assert [type(node.node).__name__ for node in retriever.retrieve("red")].count("TextNode") == 1
    assert len(rag.answer("red", retriever, llm).images) == 2


@pytest.fixture(scope="module")
def captioner(rag: ModuleType) -> object:
    """The captioner that ships with the package, a Qwen2-VL of 3 million parameters."""
    return rag.LocalModel(resolve_backbone("scene-captioner"), max_new_tokens=12)


def test_a_local_model_gets_the_images(
    rag: ModuleType, captioner: object, retriever: CocoaRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    generate = captioner.model.generate

    def record(**inputs: torch.Tensor) -> torch.Tensor:
        asked.append(inputs)
        return generate(**inputs)

    monkeypatch.setattr(captioner.model, "generate", record)
    given = rag.answer("red", retriever, captioner)
    (inputs,) = asked
    assert inputs["image_grid_thw"].shape == (3, 3)
    expected = [rag.as_jpeg(path) for path in given.images]
    sizes = captioner.processor.image_processor(
        [Image.open(rag.BytesIO(jpeg)) for jpeg in expected], return_tensors="pt"
    )
    assert torch.equal(inputs["pixel_values"], sizes["pixel_values"])
    assert given.text.strip()
    assert captioner.processor.decode(inputs["input_ids"][0]).count("a red field") == 1


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_script_names_what_is_missing(tmp_path: Path) -> None:
    arguments = ("model", "pictures", "a question", "--llm", "some-model")
    without = run(*arguments, cwd=tmp_path)
    assert without.returncode == 1
    assert "some-model is not a folder; for a model at an endpoint set OPENAI_BASE_URL" in without.stderr
    if importlib.util.find_spec("llama_index.llms") is None:
        uninstalled = run(*arguments, cwd=tmp_path, OPENAI_BASE_URL="http://localhost:9/v1")
        assert "run: pip install llama-index-llms-openai-like" in uninstalled.stderr
    nowhere = run(*arguments[:4], resolve_backbone("scene-captioner"), cwd=tmp_path)
    assert nowhere.returncode == 1
    assert "Traceback" not in nowhere.stderr
