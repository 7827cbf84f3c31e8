"""Inputs of concurrent requests form batches; each request gets what it would get alone."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import IMAGE_TOKEN, FakeModel, colour_image
from sentence_transformers import SentenceTransformer

from cocoa_embed.encode.encoder import BATCH_TOKENS, Encoder, ModelInput
from cocoa_embed.errors import UsageError
from cocoa_embed.images.load import load_image
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.serve.batching import BATCH_ITEMS, Batches, BatchingEncoder
from cocoa_embed.serve.limits import BusyError, PixelBudget


class Gate(FakeModel):
    """Holds the first batch until more inputs wait; notes the sizes of the batches of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []
        self.opened = threading.Event()
        self.reached = threading.Event()

    def _encode(self, inputs: list[Any], prompt: str | None, task: str) -> np.ndarray:
        self.sizes.append((task, len(inputs)))
        self.reached.set()
        assert self.opened.wait(60)
        return super()._encode(inputs, prompt, task)


@pytest.fixture
def batches() -> Iterator[Batches]:
    """The queue before a ``Gate``."""
    made = Batches(Encoder(Gate(), "fake"), seconds=60)
    yield made
    made.close()


def while_busy(batches: Batches, works: list[Any], jobs: int) -> list[Any]:
    """Run works, each in a thread, while a first batch holds the model; let it go when all jobs wait."""
    model, encoder = batches.encoder.model, BatchingEncoder(batches)
    with ThreadPoolExecutor(len(works) + 1) as pool:
        first = pool.submit(encoder.embed_queries, [{"text": "yellow"}])
        assert model.reached.wait(60)
        futures = [pool.submit(work) for work in works]
        while len(batches._jobs) < jobs:
            pass
        model.opened.set()
        first.result()
        return [future.exception() or future.result() for future in futures]


def test_what_waits_together_is_embedded_together_and_equals_what_is_embedded_alone(batches: Batches) -> None:
    model, encoder = batches.encoder.model, BatchingEncoder(batches)
    inputs: list[ModelInput] = [{"text": colour} for colour in ("red", "green", "blue")] * 20
    inputs[7] = {"image": colour_image("red"), "text": "blue"}
    works = [lambda each=each: encoder.embed_queries([each]) for each in inputs]
    found = while_busy(batches, works, len(inputs))
    assert model.sizes == [("query", 1), ("query", BATCH_ITEMS), ("query", len(inputs) - BATCH_ITEMS)]
    np.testing.assert_array_equal(np.concatenate(found), Encoder(FakeModel()).embed_queries(inputs))


def test_queries_and_documents_do_not_mix_and_short_embeddings_share_the_queue(batches: Batches) -> None:
    encoder, short = BatchingEncoder(batches), BatchingEncoder(batches).truncate(3)
    red: list[ModelInput] = [{"text": "red"}]
    works = [lambda: encoder.embed_queries(red), lambda: short.embed_documents(red), lambda: short.embed_queries(red)]
    whole, document, query = while_busy(batches, works, 3)
    assert sorted(batches.encoder.model.sizes[1:]) == [("document", 1), ("query", 2)]
    assert (whole.shape, document.shape) == ((1, 48), (1, 3))
    np.testing.assert_allclose(query, whole[:, :3] / np.linalg.norm(whole[:, :3]), rtol=1e-6)


def test_an_input_that_the_model_refuses_spoils_no_other(batches: Batches) -> None:
    encoder = BatchingEncoder(batches)
    items: list[ModelInput] = [{"text": "red"}, {"text": IMAGE_TOKEN}, {"text": "blue"}]
    works = [lambda each=each: encoder.embed_queries([each]) for each in items]
    red, error, blue = while_busy(batches, works, 3)
    assert isinstance(error, UsageError)
    assert str(error) == "fake does not accept the input (image features and image tokens do not match)"
    np.testing.assert_array_equal(np.concatenate([red, blue]), Encoder(FakeModel()).embed_queries([items[0], items[2]]))


def test_a_batch_has_bounded_visual_tokens(batches: Batches) -> None:
    batches.visual_tokens = lambda width, height: width
    encoder, model = BatchingEncoder(batches), batches.encoder.model
    wide: list[ModelInput] = [{"image": colour_image("red", (BATCH_TOKENS // 4, 100))}] * 10
    huge: list[ModelInput] = [{"image": colour_image("blue", (2 * BATCH_TOKENS, 100))}]
    works = [lambda: encoder.embed_queries(huge), lambda: encoder.embed_queries(wide)]
    while_busy(batches, works, 11)
    assert sorted(size for _, size in model.sizes[1:]) == [1, 2, 4, 4]  # type: ignore[attr-defined]


def test_a_long_request_lets_others_pass(batches: Batches) -> None:
    model, encoder = batches.encoder.model, BatchingEncoder(batches)
    done: list[str] = []

    def work(name: str, count: int) -> None:
        encoder.embed_queries([{"text": "red"}] * count)
        done.append(name)

    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(work, "long", 5 * BATCH_ITEMS)
        assert model.reached.wait(60)
        short = pool.submit(work, "short", 1)
        while not batches._jobs:
            pass
        model.opened.set()
        short.result()
        long.result()
    assert done == ["short", "long"]


def test_waiting_too_long_or_for_a_closed_queue_is_an_error() -> None:
    model = Gate()
    batches = Batches(Encoder(model, "fake"), seconds=0.2)
    encoder = BatchingEncoder(batches)
    for _ in range(2):
        with pytest.raises(BusyError, match=r"did not finish within 0\.2 seconds"):
            encoder.embed_queries([{"text": "red"}])
    model.opened.set()
    batches.close()
    assert model.sizes == [("query", 1)], "nobody waits for the second any more"
    with pytest.raises(BusyError, match="is stopping"):
        encoder.embed_queries([{"text": "red"}])


def test_pictures_wait_for_memory_and_release_it() -> None:
    budget = PixelBudget(100, seconds=0.1)
    for _ in range(2):
        with budget.hold(60), budget.hold(40):
            with pytest.raises(BusyError, match="left no memory for this one"), budget.hold(1):
                pass
        with pytest.raises(ZeroDivisionError), budget.hold(10**9):
            raise ZeroDivisionError


@pytest.fixture
def model(tiny_backbone: Backbone, tmp_path: Path) -> SentenceTransformer:
    tiny_backbone.save(tmp_path / "backbone")
    return build_sentence_transformer(tmp_path / "backbone", prompts={"query": "", "document": ""}, device="cpu")


def test_a_hundred_concurrent_requests_to_a_real_model_get_the_embeddings_of_single_ones(
    model: SentenceTransformer, scene_folder: Path
) -> None:
    files = sorted(scene_folder.glob("*.png"))
    inputs: list[ModelInput] = [
        {"text": "large red circle " * (number % 7)}
        if number % 3
        else {"image": load_image(files[number % len(files)])}
        for number in range(1, 101)
    ]
    alone = np.concatenate([Encoder(model).embed_queries([each]) for each in inputs])
    assert len(np.unique(alone.round(3), axis=0)) > 10
    batches = Batches(Encoder(model), seconds=60)
    with ThreadPoolExecutor(100) as pool:
        together = list(pool.map(lambda each: BatchingEncoder(batches).embed_queries([each]), inputs))
    batches.close()
    np.testing.assert_allclose(np.concatenate(together), alone, atol=1e-5)
