"""Images streamed through a model: the embeddings of ``encode_document``, in order, whatever is among them."""

import threading
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from cocoa_embed.backbone import load_backbone
from cocoa_embed.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError, UsageError
from cocoa_embed.export import export_model
from cocoa_embed.images import load_image
from cocoa_embed.preparation import EmbeddedImage
from conftest import TINY_MAX_LENGTH
from exported import write_checkpoint
from fake_model import FakeModel, colour_image

SIZES = [(40, 40), (112, 60), (60, 112), (56, 56), (200, 30), (33, 90)]


@pytest.fixture(scope="module")
def model(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    run = tmp_path_factory.mktemp("run")
    folder = export_model(write_checkpoint(backbone, run / "contrastive"), run / "model")
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noise of mixed sizes, in files of mixed formats."""
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("pictures")
    files = []
    for number in range(20):
        width, height = SIZES[number % len(SIZES)]
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        files.append(folder / f"{number:02}.{'jpg' if number % 3 else 'png'}")
        Image.fromarray(pixels).save(files[-1])
    return files


def vectors(results: list[tuple[Any, EmbeddedImage | ImageError]]) -> np.ndarray:
    return np.stack([result.vector for _, result in results if isinstance(result, EmbeddedImage)])


def data_of(colour: str, size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = BytesIO()
    colour_image(colour, size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("batch_tokens", [1, 20, 8192])
def test_embeddings_are_those_of_encode_document_in_the_order_given(
    model: SentenceTransformer, pictures: list[Path], batch_size: int, batch_tokens: int
) -> None:
    stream = Encoder(model).stream_images(
        ((path.name, path) for path in pictures), batch_size=batch_size, batch_tokens=batch_tokens
    )
    results = list(stream)
    assert [key for key, _ in results] == [path.name for path in pictures]
    expected = model.encode_document([{"image": load_image(path)} for path in pictures], batch_size=4)
    assert np.abs(vectors(results) - expected).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 1e-2, "the premise: images differ"


def test_the_document_prompt_is_applied(model: SentenceTransformer, pictures: list[Path]) -> None:
    plain = vectors(list(Encoder(model).stream_images((path, path) for path in pictures[:2])))
    prompts = model.prompts
    model.prompts = {**prompts, "document": "small blue ring "}
    try:
        prompted = vectors(list(Encoder(model).stream_images((path, path) for path in pictures[:2])))
        expected = model.encode_document([{"image": load_image(path)} for path in pictures[:2]])
    finally:
        model.prompts = prompts
    assert np.abs(prompted - expected).max() < 1e-5
    assert np.abs(prompted - plain).max() > 1e-4


def test_a_shorter_dimension_is_cut_and_of_unit_length(model: SentenceTransformer, pictures: list[Path]) -> None:
    whole = Encoder(model)
    results = vectors(list(whole.cut_to(8).stream_images((path, path) for path in pictures)))
    expected = whole.embed_documents([{"image": load_image(path)} for path in pictures])[:, :8]
    assert results.shape == (len(pictures), 8)
    assert np.abs(results - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() < 1e-5
    with pytest.raises(UsageError, match="dimensions"):
        Encoder(model, dimension=whole.dimension + 1)


def test_what_is_known_of_an_image_comes_with_it() -> None:
    ((key, result),) = Encoder(FakeModel()).stream_images([("red", data_of("red", (500, 250)))], thumbnail_size=100)
    assert isinstance(result, EmbeddedImage)
    assert (key, result.width, result.height, result.mime) == ("red", 500, 250, "image/png")
    with Image.open(BytesIO(result.thumbnail or b"")) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (100, 50))
    assert np.allclose(result.vector, Encoder(FakeModel()).embed_documents([{"image": colour_image("red")}])[0])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_bad_image_is_an_error_in_its_place_and_spoils_nothing(batch_size: int) -> None:
    good = [data_of(colour) for colour in ("red", "green", "blue", "yellow")]
    cases: list[tuple[str, bytes]] = []
    for number, data in enumerate(good):
        cases += [(f"good {number}", data), (f"cut {number}", data[:50])]
    cases += [("long", data_of("red", (1, 20_000))), ("empty", b""), ("html", b"<html>"), ("good 4", good[0])]
    results = dict(Encoder(FakeModel()).stream_images(cases, batch_size=batch_size))
    assert list(results) == [key for key, _ in cases]
    for key, result in results.items():
        assert isinstance(result, EmbeddedImage) == key.startswith("good"), key
    assert results["long"].reason.startswith("cannot be embedded (absolute aspect ratio")
    assert np.array_equal(results["good 0"].vector, results["good 4"].vector)


def test_a_vector_that_is_not_finite_is_an_error() -> None:
    class Broken(FakeModel):
        def _embed(self, item: object) -> np.ndarray:
            vector = super()._embed(item)
            return vector * np.nan if item["image"].width == 9 else vector

    images = [("a", data_of("red")), ("b", data_of("red", (9, 9))), ("c", data_of("blue"))]
    a, b, c = (result for _, result in Encoder(Broken()).stream_images(images))
    assert isinstance(a, EmbeddedImage)
    assert isinstance(c, EmbeddedImage)
    assert b.reason == "has an embedding that is not finite"


def test_a_batch_that_does_not_fit_into_memory_is_halved() -> None:
    class Small(FakeModel):
        def __call__(self, features: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
            if len(features["items"]) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(features, task)

    model = Small()
    images = [(number, data_of("red", (10 + number, 10))) for number in range(40)]
    results = list(Encoder(model).stream_images(images, batch_size=16))
    assert [key for key, _ in results] == list(range(40))
    assert all(isinstance(result, EmbeddedImage) for _, result in results)
    assert max(model.batches) <= 3


def test_the_input_is_read_a_few_batches_ahead_of_the_output() -> None:
    asked = 0

    def give() -> Iterator[tuple[int, bytes]]:
        nonlocal asked
        data = data_of("red")
        for number in range(2000):
            asked += 1
            yield number, data

    most = max(asked - done for done, _ in Encoder(FakeModel()).stream_images(give(), batch_size=8))
    assert asked == 2000
    assert most <= 8 * 40


def test_whoever_stops_early_leaves_no_thread_and_no_setting_behind() -> None:
    before, threads = threading.active_count(), torch.get_num_threads()
    stream = Encoder(FakeModel()).stream_images(((number, data_of("red")) for number in range(500)), batch_size=4)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_an_error_of_the_input_comes_through_and_ends_the_workers() -> None:
    def give() -> Iterator[tuple[int, bytes]]:
        yield 0, data_of("red")
        raise RuntimeError("the list broke")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="the list broke"):
        list(Encoder(FakeModel()).stream_images(give()))
    assert threading.active_count() == before


def test_queries_are_answered_while_a_stream_is_at_work(model: SentenceTransformer, pictures: list[Path]) -> None:
    encoder = Encoder(model)
    texts = [{"text": "a red ring " * count} for count in (1, 7, 3)]
    expected_queries = encoder.embed_queries(texts)
    expected = vectors(list(encoder.stream_images((path, path) for path in pictures)))
    answers: list[np.ndarray] = []
    asking = threading.Event()

    def ask() -> None:
        asking.set()
        for _ in range(10):
            answers.append(encoder.embed_queries(texts))

    thread = threading.Thread(target=ask)
    thread.start()
    asking.wait()
    found = vectors(list(encoder.stream_images(((path, path) for path in pictures * 3), batch_size=2)))
    thread.join()
    assert np.abs(found - np.concatenate([expected] * 3)).max() < 1e-5
    assert len(answers) == 10
    assert all(np.abs(answer - expected_queries).max() < 1e-5 for answer in answers)


@pytest.mark.parametrize("option", ["workers", "batch_size", "batch_tokens", "thumbnail_size"])
def test_numbers_that_make_no_sense_are_wrong_usage(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} is 0"):
        Encoder(FakeModel()).stream_images([], **{option: 0})


def test_a_model_of_texts_alone_is_refused_before_the_first_image() -> None:
    with pytest.raises(CocoaError, match="does not embed images"):
        Encoder(FakeModel(modalities=["text"])).stream_images([])
