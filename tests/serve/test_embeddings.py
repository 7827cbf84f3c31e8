"""``/v1/embeddings`` as clients of OpenAI's API use it, and with images."""

import base64
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, colour_image
from PIL import Image
from served import message, served, uri
from starlette.testclient import TestClient
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cocoa_embed.encode.encoder import Encoder, make_input
from cocoa_embed.images.load import decode_image


def embedded(client: TestClient, **body: Any) -> np.ndarray:
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["object"] == "list"
    assert [each["index"] for each in document["data"]] == list(range(len(document["data"])))
    return np.array([each["embedding"] for each in document["data"]])


def test_a_text_and_a_list_of_texts_are_embedded_in_order(api: TestClient) -> None:
    expected = Encoder(FakeModel()).embed_queries([{"text": "red"}, {"text": "blue"}])
    assert api.get("/v1/models").json()["data"][0]["id"] == "fake"
    np.testing.assert_allclose(embedded(api, input=["red", "blue"], model="fake", user="x"), expected)
    np.testing.assert_allclose(embedded(api, input="red"), expected[:1])
    many = embedded(api, input=["red", "blue"] * 50)
    np.testing.assert_allclose(many, np.tile(expected, (50, 1)))


def test_base64_holds_the_same_floats_and_dimensions_cut_and_normalise(api: TestClient) -> None:
    floats = embedded(api, input=["red"], dimensions=5)
    answer = api.post("/v1/embeddings", json={"input": ["red"], "dimensions": 5, "encoding_format": "base64"}).json()
    decoded = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(decoded, floats[0].astype(np.float32))
    assert np.linalg.norm(floats) == pytest.approx(1)


def test_images_alone_and_with_a_text_are_embedded_as_query_or_document(api: TestClient, colours: Path) -> None:
    file = colours / "green.png"
    expected = Encoder(FakeModel()).embed_queries([make_input(None, file), make_input("red", file)])
    found = embedded(api, input=[{"image": uri(file)}, {"image": uri(file), "text": "red"}], input_type="document")
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(embedded(api, input={"image": uri(file)}), expected[:1])


class ForgetfulModel(FakeModel):
    """Keeps no inputs."""

    def __call__(self, features: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
        try:
            return super().__call__(features, task)
        finally:
            self.queries.clear()
            self.documents.clear()


def test_pictures_of_one_request_are_decoded_as_far_as_the_budget_has_room(
    index: dict[str, Any], colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colour_image("red", (100, 10)).save(colours / "large.png")
    made: list[weakref.ref[Image.Image]] = []
    held: list[int] = []

    def pixels() -> int:
        return sum(image.width * image.height for each in made if (image := each()) is not None)

    def decode(data: bytes, name: str) -> tuple[Image.Image, str]:
        image, media_type = decode_image(data, name)
        until = time.monotonic() + 5  # the queue's thread lets a batch go a moment after its embeddings are there
        while 0 < pixels() > budget - image.width * image.height and time.monotonic() < until:
            time.sleep(0.001)
        made.append(weakref.ref(image))
        held.append(pixels())
        return image, media_type

    monkeypatch.setattr("cocoa_embed.serve.requests.decode_image", decode)
    budget = 2 * 24 * 16
    small, large = {"image": uri(colours / "red.png"), "text": "red"}, {"image": uri(colours / "large.png")}
    model = ForgetfulModel()
    with served(index, model=model, pixels=budget) as client:
        embedded(client, input=[small, small, small, "red", large, "red", small], input_type="document")
    assert held == [384, 768, 384, 1000, 384]


class Patches:
    """An image processor that makes a patch of 8 x 8 pixels, and a token of four patches."""

    merge_size = 2

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any]) -> int:
        if width > 200 * height:
            raise ValueError("too long")
        return width * height // 64


class CountedModel(FakeModel):
    """Has a tokenizer of whole words, which pads and truncates, and an image processor that counts."""

    def __init__(self) -> None:
        super().__init__()
        words = Tokenizer(WordLevel({"red": 0, "[UNK]": 1, "<EOS>": 2}, unk_token="[UNK]"))
        words.pre_tokenizer = Whitespace()
        words.post_processor = TemplateProcessing(single="$A <EOS>", special_tokens=[("<EOS>", 2)])
        words.enable_truncation(2)
        words.enable_padding(length=9)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<EOS>")
        self.processor = Patches()


def test_usage_counts_the_tokens_of_all_texts_and_images(index: dict[str, Any], colours: Path) -> None:
    colour_image("red", (64, 32)).save(colours / "wide.png")
    wide = uri(colours / "wide.png")
    with served(index, model=CountedModel()) as client:
        for given, tokens in (
            ("red", 1 + 1),
            (["red red red", "a <EOS>"] * 40, 40 * (3 + 1 + 4 + 1)),
            ({"image": wide}, 8),
            ([{"image": wide, "text": "red"}, "red"], 8 + 2 + 2),
        ):
            answer = client.post("/v1/embeddings", json={"input": given}).json()
            assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}, given


def test_a_picture_of_a_size_that_the_model_refuses_is_named(index: dict[str, Any], colours: Path) -> None:
    colour_image("red", (2001, 10)).save(colours / "long.png")
    with served(index, model=CountedModel()) as client:
        refused = client.post("/v1/embeddings", json={"input": ["red"] * 40 + [{"image": uri(colours / "long.png")}]})
        assert message(refused) == "422 input 40: is not accepted by the model (too long)"
        refused = client.post("/search", files={"image": ("long.png", (colours / "long.png").read_bytes())})
        assert message(refused) == "422 long.png: is not accepted by the model (too long)"


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({}, "400 input: Field required"),
    ({"input": []}, "400 input has 0 items; give 1 to 2048"),
    ({"input": ["a"] * 2049}, "400 input has 2049 items"),
    ({"input": ""}, "400 neither a text nor an image was given"),
    ({"input": [1, 2, 3]}, "400 input holds token ids; give texts (in LangChain"),
    ({"input": [[1, 2, 3]]}, "400 input holds token ids"),
    ({"input": None}, "400 an input is a text, or an object"),
    ({"input": {"picture": "x"}}, "400 an input is a text, or an object"),
    ({"input": {"text": 3}}, "400 text and image of an input are strings"),
    ({"input": {"image": "/etc/hostname"}}, "400 the image is neither"),
    ({"input": {"image": "data:image/png;base64,AAAA"}}, "422 input 0: is not an image"),
    ({"input": ["red", {"image": "data:,GIF89a"}]}, "422 input 1: is not an image"),
    ({"input": "red", "dimensions": 49}, "400 fake has embeddings of 48 dimensions, not of 49"),
    ({"input": "red", "dimensions": 0}, "400 dimensions: "),
    ({"input": "red", "encoding_format": "int8"}, "400 encoding_format: "),
    (
        {"input": "red", "model": "text-embedding-3-small"},
        "404 there is no model 'text-embedding-3-small' here; the only one is",
    ),
]


def test_an_invalid_request_is_explained(api: TestClient) -> None:
    for body, words in FAULTS:
        assert message(api.post("/v1/embeddings", json=body)).startswith(words), words
