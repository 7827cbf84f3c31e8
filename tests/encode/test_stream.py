"""The stream as a whole, over a model made of arithmetic; test_encoder.py has real ones."""

import threading
import time
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from fake_model import COLOURS, FakeModel, asking, colour_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_images import encoded, exif, stored

from cocoa_embed.encode import jobs, stream
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.jobs import EmbeddedImage, StreamSource
from cocoa_embed.encode.stream import default_workers
from cocoa_embed.errors import CocoaError, ImageError, UsageError

NAMES = list(COLOURS)
TRUNCATED = encoded(colour_image("blue", (99, 99)), "JPEG")[:-40]


def pictures(count: int) -> list[tuple[int, Image.Image]]:
    """Return images of many sizes."""
    return [(number, colour_image(NAMES[number % 4], (24 + number % 7, 24 + number % 5))) for number in range(count)]


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cocoa-")]


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No thread outlives its stream."""
    yield
    assert own_threads() == []


def vectors(outcomes: list[tuple[Any, EmbeddedImage | ImageError]]) -> np.ndarray:
    return np.stack([outcome.vector for _, outcome in outcomes if isinstance(outcome, EmbeddedImage)])


def expected(images: list[tuple[int, Image.Image]]) -> np.ndarray:
    return FakeModel().encode_document([{"image": image} for _, image in images], 32, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_every_image_is_embedded_as_a_document_in_its_place(count: int, dtype: torch.dtype) -> None:
    class Typed(FakeModel):
        def __call__(self, features: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
            return {"sentence_embedding": super().__call__(features, task)["sentence_embedding"].to(dtype)}

    model = Typed(prompts={"query": "find: ", "document": "keep: "})
    images = pictures(count)
    outcomes = list(Encoder(model).stream_images(iter(images), batch_size=8, thumbnail_size=12))
    assert [key for key, _ in outcomes] == list(range(count))
    if count:
        np.testing.assert_allclose(vectors(outcomes), expected(images), rtol=0 if dtype == torch.float32 else 0.01)
        assert model.document_prompts == {"keep: "}
        assert max(model.batches) <= 8
        assert model.threads == {threading.get_ident()}, "the model runs in the calling thread"
    for (_, image), (_, outcome) in zip(images, outcomes, strict=True):
        assert isinstance(outcome, EmbeddedImage)
        assert (outcome.width, outcome.height) == image.size
        assert (outcome.vector.dtype, outcome.vector.shape) == (np.float32, (48,))
        assert outcome.vector.base is None, "a result does not keep its batch in memory"
        assert max(Image.open(BytesIO(outcome.thumbnail)).size) == 12


@pytest.mark.parametrize("kind", ["bytes", "str", "path", "opened", "in memory"])
def test_every_source_has_an_upright_size_a_media_type_and_a_thumbnail_and_is_read_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, image = tmp_path / "photo", colour_image("red", (10, 30))
    path.write_bytes(encoded(stored(image, 6), "JPEG", exif=exif(6)))
    read = Mock(wraps=jobs.read_stable_file)
    monkeypatch.setattr(jobs, "read_stable_file", read)
    sources = {"bytes": path.read_bytes(), "str": str(path), "path": path, "opened": Image.open(path)}
    for thumbnail_size, expected_size in ((15, (5, 15)), (320, (10, 30))):
        images = [("key", sources.get(kind, image))]
        ((_, outcome),) = Encoder(FakeModel()).stream_images(images, thumbnail_size=thumbnail_size)
        assert (outcome.width, outcome.height) == (10, 30)
        assert outcome.mime == ("application/octet-stream" if kind == "in memory" else "image/jpeg")
        thumbnail = Image.open(BytesIO(outcome.thumbnail))
        assert (thumbnail.format, thumbnail.size) == ("JPEG", expected_size)
    assert read.call_count == (2 if kind in ("str", "path") else 0)


class Picky(FakeModel):
    """Refuses an image of one size, and overflows for another."""

    def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
        if item["image"].size == (31, 31):
            raise ValueError("image features and image tokens\ndo not match")
        return super()._embed(item) * (np.inf if item["image"].size == (32, 32) else 1)


BAD: dict[str, tuple[StreamSource, str]] = {
    "broken": (b"no image", "(8, 'broken'): is not an image"),
    "truncated": (TRUNCATED, "truncated"),
    "missing": ("no/such\n/file.png", "'no/such\\n/file.png': does not exist"),
    "refused by the processor": (
        colour_image("red", (1, 20_000)),
        "cannot be embedded (absolute aspect ratio must be smaller than 200)",
    ),
    "refused by the model": (
        colour_image("red", (31, 31)),
        "cannot be embedded (image features and image tokens do not match)",
    ),
    "overflowing": (colour_image("red", (32, 32)), "(8, 'overflowing'): has an embedding that is not finite"),
}


@settings(max_examples=40)
@given(
    kinds=st.lists(st.sampled_from(["good", *BAD]), max_size=40),
    batch_size=st.integers(1, 9),
    workers=st.integers(1, 3),
)
def test_each_image_has_the_same_outcome_as_alone(kinds: list[str], batch_size: int, workers: int) -> None:
    good = colour_image("red")
    images = [((8, kind), good if kind == "good" else BAD[kind][0]) for kind in kinds]
    outcomes = list(Encoder(Picky()).stream_images(images, batch_size=batch_size, workers=workers))
    assert [key for key, _ in outcomes] == [key for key, _ in images]
    for (_, kind), outcome in outcomes:
        if kind == "good":
            assert isinstance(outcome, EmbeddedImage)
            assert np.array_equal(outcome.vector, expected([(0, good)])[0])
        else:
            assert BAD[kind][1] in str(outcome)


@pytest.mark.parametrize(
    ("sources", "max_batch_bytes", "limit"),
    [
        # Per image: 7 batches of 4 ahead or in a window of 4 batches, 8 measured ahead, one in the model.
        ([colour_image("red", (8 + grown, 8)) for grown in range(3)], stream.MAX_BATCH_BYTES, 44),
        ([b"no image"], stream.MAX_BATCH_BYTES, 90),
        # A batch holds two images, a window four.
        ([colour_image("red", (100, 100))], 2 * 3 * 100 * 100, 24),
        # The bytes of a file count where they are more than its pixels.
        ([encoded(colour_image("red", (4, 4)), "PNG") + bytes(10_000)], 25_000, 44),
    ],
)
def test_an_endless_input_is_read_a_bounded_way_ahead(
    monkeypatch: pytest.MonkeyPatch, sources: list[StreamSource], max_batch_bytes: int, limit: int
) -> None:
    monkeypatch.setattr(stream, "MAX_BATCH_BYTES", max_batch_bytes)
    read: list[StreamSource] = []

    def images() -> Iterator[tuple[int, StreamSource]]:
        for number, source in enumerate(cycle(sources)):
            read.append(source)
            yield number, source

    outcomes = Encoder(FakeModel()).stream_images(images(), batch_size=4, workers=1)
    assert (read, own_threads()) == ([], []), "nothing is read before the first result is requested"
    for key, _ in outcomes:
        assert len(read) - key <= limit
        if key == 200:
            break
    outcomes.close()
    assert own_threads() == []


class Grid:
    """An image processor that counts a patch for each pixel."""

    merge_size = 1

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any]) -> int:
        return height * width


def test_batches_hold_images_of_similar_sizes_within_the_token_limit() -> None:
    model = FakeModel()
    model.processor = Grid()
    images = [(number, colour_image("red", (10 if number % 2 else 30, 10))) for number in range(64)]
    list(Encoder(model).stream_images(images, batch_size=8, batch_tokens=1200))
    widths = (item["image"].width for item in model.documents)
    batches = [list(islice(widths, count)) for count in model.batches]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert {width: max(len(batch) for batch in batches if batch[0] == width) for width in (10, 30)} == {10: 8, 30: 4}


@pytest.mark.parametrize(("is_malformed", "reason"), [(False, "the disk is gone"), (True, "cannot unpack")])
def test_an_error_of_the_input_is_raised_after_its_images(is_malformed: bool, reason: str) -> None:
    def images() -> Iterator[Any]:
        yield from pictures(30)
        if is_malformed:
            yield 30
        raise OSError("the disk is gone")

    outcomes = Encoder(FakeModel()).stream_images(images(), batch_size=4)
    assert [next(outcomes)[0] for _ in range(30)] == list(range(30))
    with pytest.raises((OSError, TypeError), match=reason):
        next(outcomes)


@pytest.mark.parametrize("step", ["_embed", "preprocess"])
@pytest.mark.parametrize(
    ("fault", "error", "reason"),
    [
        (KeyError("a fault in the program"), KeyError, "a fault in the program"),
        (RuntimeError("CUDA error: bad\naccess"), CocoaError, r"cannot continue; start again \(CUDA error: bad a"),
    ],
)
def test_a_fault_in_the_program_and_a_lost_device_are_blamed_on_no_image(
    step: str, fault: Exception, error: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeModel, step, Mock(side_effect=fault))
    with pytest.raises(error, match=reason):
        list(Encoder(FakeModel()).stream_images(pictures(50), batch_size=4))


class Small(FakeModel):
    """Has memory for so many images at once."""

    room = 3
    failures = 0

    def __call__(self, features: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
        if len(features["items"]) > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().__call__(features, task)


def test_a_batch_that_exceeds_memory_is_halved_and_later_ones_are_planned_smaller() -> None:
    model = Small()
    outcomes = list(Encoder(model).stream_images(pictures(200), batch_size=16))
    assert np.array_equal(vectors(outcomes), expected(pictures(200)))
    assert max(model.batches) <= 3
    # Sixteen images fail seven times until all are in twos; only batches that were planned before do.
    assert 7 <= model.failures <= 7 * 8
    model.room = 0
    outcomes = list(Encoder(model).stream_images(pictures(5)))
    reason = "cannot be embedded (CUDA out of memory. Tried to allocate 2 GiB)"
    assert [outcome.reason for _, outcome in outcomes] == [reason] * 5


def test_queries_are_answered_while_images_stream() -> None:
    class Slow(FakeModel):
        def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
            if "image" in item:
                time.sleep(0.002)
            return super()._embed(item)

    encoder = Encoder(Slow())
    with asking(encoder, {"text": "red"}) as answers:
        outcomes = list(encoder.stream_images(pictures(200), batch_size=8))
    assert np.array_equal(vectors(outcomes), expected(pictures(200)))
    assert len(answers) >= 10, "a query waits for a batch or two, not for the stream, which has 25"


@pytest.mark.parametrize(("cores", "on_cpu", "on_device"), [(1, 1, 1), (2, 1, 1), (8, 2, 7), (64, 16, 12)])
def test_workers_leave_the_model_a_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, on_cpu: int, on_device: int
) -> None:
    monkeypatch.setattr(stream, "available_cores", lambda: cores)
    assert [default_workers(is_on_cpu=is_on_cpu) for is_on_cpu in (True, False)] == [on_cpu, on_device]


@pytest.mark.parametrize("name", ["workers", "batch_size", "batch_tokens", "thumbnail_size"])
def test_a_number_that_is_not_positive_is_wrong_usage_at_once(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0; it must be 1 or more"):
        Encoder(FakeModel()).stream_images([], **{name: 0})


def test_an_encoder_may_bring_the_limits_of_its_streams() -> None:
    images = [(number, colour_image("red")) for number in range(6)]
    model = FakeModel()
    list(Encoder(model, batch_tokens=2, workers=1).truncate(8).stream_images(images))
    assert model.batches == [2, 2, 2]
    list(Encoder(model, batch_tokens=2).stream_images(images, batch_tokens=6))
    assert model.batches[3:] == [6]
