import io
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from exported import PROMPTS, write_checkpoint
from fake_model import IMAGE_TOKEN, FakeModel, asking, colour_image
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW
from tiny_backbones import TINY_MAX_LENGTH, every_family, tiny_clip_model

from cocoa_embed.demo.scenes import draw, sample_scene
from cocoa_embed.encode.document_model import DocumentModel, document_prompt
from cocoa_embed.encode.encoder import Encoder, ModelInput, make_input
from cocoa_embed.encode.jobs import CaptionedImage, EmbeddedImage
from cocoa_embed.encode.processor_lock import ProcessorLock
from cocoa_embed.encode.stream import ImageStream
from cocoa_embed.errors import CocoaError, ImageError, UsageError
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.model.template import TEMPLATE

TOLERANCE = 1e-5


def test_an_input_is_a_text_an_image_or_both() -> None:
    red = colour_image("red")
    for text in ("red", "🦓", "café", "\0", "\ufffd"):
        assert make_input(text) == {"text": text}
    assert make_input("red", red).keys() == {"text", "image"}
    assert make_input("", red).keys() == {"image"}
    with pytest.raises(UsageError, match="neither a text nor an image"):
        make_input("")


@pytest.mark.parametrize("text", ["\ud83e", "caf\udce9"])
def test_a_text_that_is_not_valid_unicode_is_wrong_usage(text: str) -> None:
    encoder = Encoder(FakeModel())
    for use in (lambda item: make_input(**item), lambda item: encoder.embed_queries([item])):
        with pytest.raises(UsageError, match="not valid Unicode") as caught:
            use({"text": text, "image": colour_image("red")})
        assert str(caught.value).isascii()


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"image": colour_image("red", (1, 20_000))}, "absolute aspect ratio must be smaller than 200"),
        ({"text": f"red {IMAGE_TOKEN}"}, "image features and image tokens do not match"),
    ],
)
def test_a_query_that_the_model_refuses_is_reported_in_one_sentence_that_names_the_model(
    item: ModelInput, reason: str
) -> None:
    with pytest.raises(CocoaError, match=reason) as caught:
        Encoder(FakeModel(), "cocoa-tiny").embed_queries([item])
    assert not isinstance(caught.value, UsageError)
    assert str(caught.value) == f"cocoa-tiny does not accept the query ({reason})"


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({}, None, None),
        ({"query": "q: ", "document": "d: "}, None, "d: "),
        ({"corpus": "c: ", "passage": "p: "}, None, "p: "),
        ({"corpus": "c: "}, "query", "c: "),
        ({"query": "q: "}, "query", "q: "),
        ({"document": ""}, "query", ""),
    ],
)
def test_the_document_prompt_is_that_of_encode_document(
    prompts: dict[str, str], default: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SentenceTransformer(modules=[torch.nn.Dropout()], device="cpu").train()
    model.prompts, model.default_prompt_name = prompts, default

    def preprocess(inputs: list[str], prompt: str | None, task: str) -> None:
        raise KeyError(prompt)

    monkeypatch.setattr(model, "preprocess", preprocess)
    with pytest.raises(KeyError) as caught:
        model.encode_document(["x"])
    assert caught.value.args == (expected,)
    assert document_prompt(model) == expected
    model.train()
    DocumentModel(model, ProcessorLock())
    assert not model.training, "it is in evaluation mode, as encode puts it"


@pytest.fixture(scope="module")
def qwen(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """An exported tiny model with a document prompt."""
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    checkpoint = write_checkpoint(backbone, tmp_path_factory.mktemp("checkpoint"))
    return build_sentence_transformer(checkpoint, prompts=PROMPTS).to("cpu")


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    """Drawings of many sizes: their embeddings differ."""
    generator = random.Random(0)
    drawings = [draw(sample_scene(generator, "train"), generator) for _ in range(9)]
    return [drawing.resize((40 + 11 * (i % 4), 36 + 13 * (i % 3))) for i, drawing in enumerate(drawings)]


def documents(encoder: Encoder, images: list[Image.Image]) -> np.ndarray:
    """Return the embeddings of encode_document, one image at a time."""
    return np.concatenate([encoder.embed_documents([{"image": image}]) for image in images])


def streamed(encoder: Encoder, images: list[Image.Image], **settings: int) -> np.ndarray:
    outcomes = [outcome for _, outcome in encoder.stream_images(enumerate(images), **settings)]
    assert all(isinstance(outcome, EmbeddedImage) for outcome in outcomes)
    return np.stack([outcome.vector for outcome in outcomes])


def distance(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


def test_an_image_is_streamed_with_its_caption_as_encode_document_embeds_both(
    qwen: SentenceTransformer, scenes: list[Image.Image]
) -> None:
    """Beside images without any, in the order given; a caption is read as its characters."""
    encoder = Encoder(qwen)
    texts = [None, "a red ring", "<|image_pad|> and <|endoftext|>", None, "two words " * 40]
    images = [CaptionedImage(encoded(scene), text) if text else scene for scene, text in zip(scenes, texts)]  # noqa: B905
    vectors = streamed(encoder, images, batch_size=4)  # type: ignore[arg-type]
    expected = [encoder.embed_documents([make_input(text, scene)])[0] for scene, text in zip(scenes, texts)]  # noqa: B905
    assert distance(vectors, np.stack(expected)) < 1e-5
    alone = documents(encoder, scenes[: len(texts)])
    assert [float(np.abs(a - b).max()) > 1e-2 for a, b in zip(vectors, alone, strict=True)] == [bool(t) for t in texts]


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@every_family
def test_a_streamed_image_is_embedded_as_encode_document_embeds_it(
    qwen: SentenceTransformer, scenes: list[Image.Image], tmp_path: Path
) -> None:
    encoder = Encoder(qwen)
    expected = documents(encoder, scenes)
    queries = encoder.embed_queries([{"image": image} for image in scenes])
    assert distance(expected[0], expected[1]) > 100 * TOLERANCE
    assert distance(expected, queries) > 100 * TOLERANCE, "the document prompt changes embeddings"
    for settings in ({}, {"batch_size": 4}, {"batch_tokens": 24, "workers": 3}):
        assert distance(streamed(encoder, scenes, **settings), expected) < TOLERANCE
    paths = [tmp_path / f"{number}.png" for number in range(len(scenes))]
    for scene, path in zip(scenes, paths, strict=True):
        scene.save(path)
    assert distance(streamed(encoder, paths), qwen.encode_document([str(path) for path in paths])) < TOLERANCE


def test_a_clip_model_streams_too(tmp_path: Path, scenes: list[Image.Image]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(tiny_clip_model(tmp_path))
    encoder.require_images()
    assert encoder.dimension == 24
    expected = documents(encoder, scenes)
    assert distance(expected[0], expected[1]) > 100 * TOLERANCE
    assert distance(streamed(encoder, scenes, batch_size=4), expected) < 10 * TOLERANCE


def test_a_text_that_mentions_a_special_token_is_read_as_its_characters_by_templates_of_others(
    qwen: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [make_input(text) for text in ("red <|image_pad|> ring", "<|endoftext|>", "red ring")]
    expected = qwen.encode_query(queries)
    assert distance(Encoder(qwen).embed_queries(queries), expected) < TOLERANCE
    monkeypatch.setattr(qwen.processor, "chat_template", TEMPLATE.replace("SPECIAL_TOKENS", "[]"))
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)image"):
        qwen.encode_query(queries[:1])
    assert distance(Encoder(qwen).embed_queries(queries), expected) < TOLERANCE


def test_an_image_that_does_not_fit_into_the_sequence_is_refused_by_itself(
    qwen: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncation would cut off visual tokens."""
    small, large = Image.new("RGB", (28, 28)), Image.new("RGB", (112, 112))
    monkeypatch.setattr(qwen, "max_seq_length", 16)
    outcomes = dict(Encoder(qwen).stream_images(enumerate([small, large, small]), batch_size=8))
    assert isinstance(outcomes[1], ImageError)
    assert "cannot be embedded (" in outcomes[1].reason
    assert np.allclose(outcomes[0].vector, outcomes[2].vector)


@pytest.mark.parametrize("own", [32, 12])
def test_a_dimension_truncates_and_normalises_what_the_model_itself_truncates(
    qwen: SentenceTransformer, scenes: list[Image.Image], own: int
) -> None:
    scenes = scenes[:3]
    with qwen.truncate_embeddings(own):
        whole, encoder = Encoder(qwen), Encoder(qwen, dimension=8)
        assert (whole.dimension, encoder.dimension) == (own, 8)
        expected = documents(whole, scenes)
        assert distance(streamed(whole, scenes), expected) < TOLERANCE
        assert (np.linalg.norm(expected[0]) < 0.99) == (own == 12), "the model does not normalise what it truncates"
        normalised = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
        assert distance(streamed(encoder, scenes), normalised) < TOLERANCE
        assert distance(documents(encoder, scenes), normalised) < TOLERANCE
        query = encoder.embed_queries([{"text": "red"}])
        assert query.shape == (1, 8)
        assert np.linalg.norm(query) == pytest.approx(1, abs=1e-6)
        for dimension in (0, 33):
            reason = f"^tiny has embeddings of {own} dimensions, not of {dimension}; give 1 to {own}$"
            with pytest.raises(UsageError, match=reason):
                Encoder(qwen, "tiny", dimension)


@pytest.mark.parametrize("modalities", [("text",), ("image",), ("text", "image")])
def test_a_dimension_that_the_model_does_not_know_is_measured(modalities: tuple[str, ...]) -> None:
    class Unaware(FakeModel):
        def get_embedding_dimension(self) -> None:
            return None

    assert Encoder(Unaware(modalities=modalities)).dimension == 48
    assert Encoder(Unaware(modalities=modalities), dimension=40).dimension == 40


def test_truncated_queries_change_no_streamed_image(
    qwen: SentenceTransformer, scenes: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change the state of the tokenizer that documents use."""
    short = partial(qwen.encode_query, processing_kwargs={"text": {"max_length": 8}})
    monkeypatch.setattr(qwen, "encode_query", short)
    # A truncated batch is refused, and would be embedded in halves.
    monkeypatch.setattr(ImageStream, "_embed_halves", Mock(side_effect=AssertionError("a batch was refused")))
    encoder = Encoder(qwen)
    item: ModelInput = {"text": "large red circle " * 9}
    expected, answer = documents(encoder, scenes), encoder.embed_queries([item])
    with asking(encoder, item) as answers:
        found = [streamed(encoder, scenes, batch_size=4, workers=3) for _ in range(3)]
    assert max(distance(each, expected) for each in found) < TOLERANCE
    assert answers
    assert max(distance(each, answer) for each in answers) < TOLERANCE


def test_a_model_that_embeds_only_text_is_refused_at_once() -> None:
    encoder = Encoder(SentenceTransformer(modules=[BoW(vocab=["red", "green"])], device="cpu"), "cocoa-words")
    for ask in (encoder.require_images, lambda: encoder.stream_images([])):
        with pytest.raises(CocoaError, match="cocoa-words does not embed images; use a multimodal model"):
            ask()


def test_a_truncated_encoder_takes_turns_with_the_whole_one() -> None:
    whole = Encoder(FakeModel(), "fake")
    short = whole.truncate(12)
    assert (whole.dimension, short.dimension, short.name) == (48, 12, "fake")
    assert short.fingerprint == whole.fingerprint
    images: list[ModelInput] = [{"image": colour_image("red")}] * 50
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda encoder: encoder.embed_documents(images), [whole, short] * 4))
    assert len(whole.model.batches) == 8, "the model refuses two at once"
