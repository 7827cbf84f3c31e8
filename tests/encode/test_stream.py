"""The stream as a whole, over a model made of arithmetic; tests/test_encoder.py has real ones."""

import threading
import time
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_model import COLOURS, FakeModel, colour_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cocoa_embed.encode import cpu_threads as cores
from cocoa_embed.encode import stream
from cocoa_embed.encode.cpu_threads import CoreShare
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.prepare import EmbeddedImage
from cocoa_embed.encode.stream import default_workers
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.images.load import ImageError

NAMES = list(COLOURS)


def pictures(count: int, side: int = 24) -> list[tuple[int, Image.Image]]:
    """Return images of many sizes."""
    return [
        (number, colour_image(NAMES[number % 4], (side + number % 7, side + number % 5))) for number in range(count)
    ]


def threads_of_the_stream() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cocoa-")]


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No thread outlives its stream, and torch has as many threads as before."""
    before = torch.get_num_threads()
    yield
    assert threads_of_the_stream() == []
    assert torch.get_num_threads() == before


@pytest.fixture(params=["beside", "in turn", "as measured"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the model run beside the workers or in turn with them, on a machine of two cores."""
    monkeypatch.setattr(stream, "available_cores", lambda: 2)
    if request.param == "beside":
        monkeypatch.setattr(CoreShare, "is_in_turn", lambda self, *, is_all_prepared: False)
    if request.param == "in turn":
        monkeypatch.setattr(CoreShare, "has_choice", True)
        monkeypatch.setattr(CoreShare, "is_in_turn", lambda self, *, is_all_prepared: True)
    return request.param


def vectors(outcomes: list[tuple[Any, EmbeddedImage | ImageError]]) -> np.ndarray:
    return np.stack([outcome.vector for _, outcome in outcomes if isinstance(outcome, EmbeddedImage)])


def expected(images: list[tuple[int, Image.Image]]) -> np.ndarray:
    return FakeModel().encode_document([{"image": image} for _, image in images], 32, False)


@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_every_image_is_embedded_as_a_document_in_its_place(way: str, count: int) -> None:
    model = FakeModel(prompts={"query": "find: ", "document": "keep: "})
    images = pictures(count)
    outcomes = list(Encoder(model).stream_images(iter(images), batch_size=8))
    assert [key for key, _ in outcomes] == list(range(count))
    if count:
        assert np.array_equal(vectors(outcomes), expected(images))
        assert model.document_prompts == {"keep: "}
        assert max(model.batches) <= 8
    for (_, image), (_, outcome) in zip(images, outcomes, strict=True):
        assert isinstance(outcome, EmbeddedImage)
        assert (outcome.width, outcome.height) == image.size
        assert (outcome.vector.dtype, outcome.vector.shape) == (np.float32, (48,))


@given(
    kinds=st.lists(st.sampled_from(["good", "broken", "truncated", "thin", "missing"]), max_size=40),
    batch_size=st.integers(1, 9),
    workers=st.integers(1, 3),
)
def test_whatever_is_among_them_every_image_has_the_outcome_it_has_alone(
    kinds: list[str], batch_size: int, workers: int
) -> None:
    sources = {
        "good": colour_image("red"),
        "broken": b"no image",
        "truncated": jpeg(colour_image("blue", (99, 99)))[:-40],
        "thin": colour_image("red", (1, 20_000)),
        "missing": "no/such/file.png",
    }
    images = [((number, kind), sources[kind]) for number, kind in enumerate(kinds)]
    outcomes = list(Encoder(FakeModel()).stream_images(images, batch_size=batch_size, workers=workers))
    assert [key for key, _ in outcomes] == [key for key, _ in images]
    reasons = {
        "broken": "is not an image",
        "truncated": "truncated",
        "thin": "cannot be embedded (absolute aspect ratio must be smaller than 200)",
        "missing": "does not exist",
    }
    for (_, kind), outcome in outcomes:
        if kind == "good":
            assert isinstance(outcome, EmbeddedImage)
            assert np.array_equal(outcome.vector, expected([(0, colour_image("red"))])[0])
        else:
            assert isinstance(outcome, ImageError)
            assert reasons[kind] in outcome.reason


def jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def test_paths_bytes_and_images_may_be_mixed(way: str, tmp_path: Path) -> None:
    image = colour_image("green")
    image.save(tmp_path / "green.png")
    data = (tmp_path / "green.png").read_bytes()
    sources = [tmp_path / "green.png", str(tmp_path / "green.png"), data, image]
    outcomes = list(Encoder(FakeModel()).stream_images(enumerate(sources)))
    assert len(np.unique(vectors(outcomes), axis=0)) == 1
    assert [outcome.mime for _, outcome in outcomes] == ["image/png"] * 3 + ["application/octet-stream"]


def test_thumbnails_are_drawn_if_asked_for() -> None:
    encoder, images = Encoder(FakeModel()), [("a", colour_image("red", (60, 30)))]
    ((_, outcome),) = encoder.stream_images(images, thumbnail_size=20)
    assert Image.open(BytesIO(outcome.thumbnail)).size == (20, 10)
    ((_, outcome),) = encoder.stream_images(images)
    assert outcome.thumbnail is None


def test_an_early_end_ends_the_workers(way: str) -> None:
    read = []

    def images() -> Iterator[tuple[int, Image.Image]]:
        for number in range(10**6):
            read.append(number)
            yield number, colour_image("red")

    outcomes = Encoder(FakeModel()).stream_images(images(), batch_size=4)
    for key, _ in outcomes:
        if key == 20:
            break
    assert threads_of_the_stream()
    outcomes.close()
    assert threads_of_the_stream() == []
    assert len(read) < 200


def test_a_stream_that_is_forgotten_ends_its_workers() -> None:
    outcomes = Encoder(FakeModel()).stream_images(pictures(500), batch_size=4)
    next(outcomes)
    del outcomes
    assert threads_of_the_stream() == []


def test_a_stream_that_is_never_begun_starts_nothing() -> None:
    outcomes = Encoder(FakeModel()).stream_images(pictures(5))
    assert threads_of_the_stream() == []
    del outcomes


def test_what_the_input_raises_comes_after_what_it_gave(way: str) -> None:
    def images() -> Iterator[tuple[int, Image.Image]]:
        yield from pictures(30)
        raise OSError("the disk is gone")

    outcomes = Encoder(FakeModel()).stream_images(images(), batch_size=4)
    assert [next(outcomes)[0] for _ in range(30)] == list(range(30))
    with pytest.raises(OSError, match="the disk is gone"):
        next(outcomes)


def test_an_error_of_ours_ends_the_workers() -> None:
    class Faulty(FakeModel):
        def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
            raise KeyError("a fault in the program")

    with pytest.raises(KeyError, match="a fault in the program"):
        list(Encoder(Faulty()).stream_images(pictures(50), batch_size=4))


def test_a_fault_in_a_worker_is_raised() -> None:
    class Faulty(FakeModel):
        def preprocess(self, *arguments: object, **settings: object) -> dict[str, Any]:
            raise KeyError("a fault in the program")

    with pytest.raises(KeyError, match="a fault in the program"):
        list(Encoder(Faulty()).stream_images(pictures(50), batch_size=4))


def test_an_image_that_the_model_itself_refuses_spoils_nothing_else(way: str) -> None:
    class Refusing(FakeModel):
        def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
            if item["image"].size == (29, 26):
                raise ValueError("image features and image tokens\ndo not match")
            return super()._embed(item)

    outcomes = list(Encoder(Refusing()).stream_images(pictures(50), batch_size=8))
    refused = [key for key, outcome in outcomes if isinstance(outcome, ImageError)]
    assert refused == [key for key, image in pictures(50) if image.size == (29, 26)] != []
    reason = dict(outcomes)[refused[0]].reason
    assert reason == "cannot be embedded (image features and image tokens do not match)"
    good = [(key, image) for key, image in pictures(50) if image.size != (29, 26)]
    assert np.array_equal(vectors(outcomes), expected(good))


class Small(FakeModel):
    """Has memory for so many images at once."""

    room = 3
    failures = 0

    def __call__(self, features: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
        if len(features["items"]) > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().__call__(features, task)


def test_a_batch_that_the_device_has_no_memory_for_is_halved_and_the_next_planned_smaller(way: str) -> None:
    model = Small()
    outcomes = list(Encoder(model).stream_images(pictures(200), batch_size=16))
    assert np.array_equal(vectors(outcomes), expected(pictures(200)))
    assert max(model.batches) <= 3
    # Sixteen images fail seven times until all are in twos. The batches that were under way do, the others do not.
    assert 7 <= model.failures <= 7 * 8
    assert len(model.batches) > 90


def test_an_image_that_there_is_never_memory_for_is_an_error() -> None:
    class Full(Small):
        room = 0

    outcomes = list(Encoder(Full()).stream_images(pictures(5)))
    assert [outcome.reason for _, outcome in outcomes] == [
        "cannot be embedded (CUDA out of memory. Tried to allocate 2 GiB)"
    ] * 5


def test_a_lost_device_is_no_images_fault() -> None:
    class Lost(FakeModel):
        def __call__(self, features: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    with pytest.raises(CocoaError, match=r"cannot go on; start again \(CUDA error: an illegal memory access was"):
        list(Encoder(Lost()).stream_images(pictures(5)))


def test_a_vector_that_is_not_finite_is_an_error(way: str) -> None:
    class Overflowing(FakeModel):
        def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
            return super()._embed(item) * (np.inf if item["image"].getpixel((0, 0)) == COLOURS["blue"] else 1)

    outcomes = list(Encoder(Overflowing()).stream_images(pictures(40), batch_size=8))
    wrong = [key for key, outcome in outcomes if isinstance(outcome, ImageError)]
    assert wrong == list(range(2, 40, 4))
    assert str(dict(outcomes)[2]) == "2: has an embedding that is not finite"


@pytest.mark.parametrize("dimension", [12, 48])
def test_vectors_are_cut_and_normalised_as_those_of_queries_and_documents_are(dimension: int) -> None:
    encoder = Encoder(FakeModel(), dimension=dimension)
    images = pictures(9)
    streamed = vectors(list(encoder.stream_images(images)))
    documents = encoder.embed_documents([{"image": image} for _, image in images])
    queries = encoder.embed_queries([{"image": image} for _, image in images])
    assert streamed.shape == (9, dimension)
    assert np.allclose(np.linalg.norm(streamed, axis=1), 1)
    assert np.allclose(streamed, documents)
    assert np.allclose(streamed, queries)


def test_a_query_is_answered_while_images_stream(way: str) -> None:
    class Slow(FakeModel):
        def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
            if "image" in item:
                time.sleep(0.002)
            return super()._embed(item)

    model, answers, done = Slow(), [], threading.Event()
    encoder = Encoder(model)

    def ask() -> None:
        while not done.is_set():
            started = time.perf_counter()
            encoder.embed_queries([{"text": "red"}])
            answers.append(time.perf_counter() - started)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        outcomes = list(encoder.stream_images(pictures(200), batch_size=8))
    finally:
        done.set()
        thread.join()
    assert np.array_equal(vectors(outcomes), expected(pictures(200)))
    # A batch takes 16 ms: whoever asks waits for one or two, not for the stream, which takes 25 of them.
    assert len(answers) >= 10
    assert sorted(answers)[len(answers) // 2] < 0.1


def test_two_threads_may_stream_at_once() -> None:
    encoder = Encoder(FakeModel())
    found: list[np.ndarray] = []

    def run() -> None:
        found.append(vectors(list(encoder.stream_images(pictures(150), batch_size=8))))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 3
    assert all(np.array_equal(each, expected(pictures(150))) for each in found)


def test_the_model_runs_in_the_thread_that_asks() -> None:
    model = FakeModel()
    list(Encoder(model).stream_images(pictures(50), batch_size=8))
    assert model.threads == {threading.get_ident()}


def test_the_caller_has_its_torch_threads_between_two_results(way: str) -> None:
    before = torch.get_num_threads()
    for _ in Encoder(FakeModel()).stream_images(pictures(50), batch_size=8):
        assert torch.get_num_threads() == before


def test_the_model_and_the_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    model_threads, worker_threads = set(), set()

    class Watching(FakeModel):
        def preprocess(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
            worker_threads.add(torch.get_num_threads())
            return super().preprocess(*arguments, **settings)

        def __call__(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
            model_threads.add(torch.get_num_threads())
            return super().__call__(*arguments, **settings)

    monkeypatch.setattr(stream, "available_cores", lambda: 4)
    with cores.torch_threads(4):
        list(Encoder(Watching()).stream_images(pictures(200), batch_size=8, workers=1))
    assert worker_threads == {1}
    assert model_threads == {3, 4}


@pytest.mark.parametrize(
    ("available", "is_on_cpu", "workers"),
    [(1, True, 1), (2, True, 1), (8, True, 2), (1, False, 1), (2, False, 1), (8, False, 7), (64, False, 12)],
)
def test_workers_leave_the_model_a_core(
    monkeypatch: pytest.MonkeyPatch, available: int, is_on_cpu: bool, workers: int
) -> None:
    monkeypatch.setattr(stream, "available_cores", lambda: available)
    assert default_workers(is_on_cpu=is_on_cpu) == workers


@pytest.mark.parametrize("name", ["workers", "batch_size", "batch_tokens", "thumbnail_size"])
def test_a_number_that_makes_no_sense_is_wrong_usage_at_once(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0; it must be 1 or more"):
        Encoder(FakeModel()).stream_images([], **{name: 0})


def test_a_model_that_knows_only_text_is_refused_at_once() -> None:
    with pytest.raises(CocoaError, match="cocoa-words does not embed images"):
        Encoder(FakeModel(modalities=["text"]), "cocoa-words").stream_images([])


def test_the_results_do_not_hold_on_to_their_batch() -> None:
    ((_, outcome), *_) = Encoder(FakeModel()).stream_images(pictures(20))
    assert outcome.vector.base is None
