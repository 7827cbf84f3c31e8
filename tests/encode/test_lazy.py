"""A lazy encoder gives what its model gives, and loads it once: for the first image or query, not before."""

from pathlib import Path

import numpy as np
import pytest
from fake_model import FakeModel
from table_files import png

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.lazy import LazyEncoder
from cocoa_embed.errors import CocoaError, UsageError

RED = [{"text": "red"}]
PICTURES = [("a", png(1)), ("b", png(2))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COCOA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("modules.json", "model.safetensors"):
        (folder / name).touch()
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[FakeModel]:
    """Every model that is loaded."""
    loads: list[FakeModel] = []

    def load(*_: object, **__: object) -> FakeModel:
        loads.append(FakeModel())
        return loads[-1]

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", load)
    return loads


def test_a_model_that_was_described_is_loaded_for_the_first_image_only(folder: Path, loads: list[FakeModel]) -> None:
    first = LazyEncoder(folder)
    assert (first.fingerprint, first.dimension, len(loads)) == (Encoder(FakeModel()).fingerprint, 48, 1)  # type: ignore[arg-type]
    known = LazyEncoder(folder)
    known.require_images()
    assert (known.fingerprint, known.dimension, known.name) == (first.fingerprint, 48, str(folder))
    assert list(known.stream_images([])) == []
    assert (len(loads), known.load_seconds, first.load_seconds > 0) == (1, 0, True)
    short = known.truncate(8)
    made = dict(known.stream_images(PICTURES))
    assert len(loads) == 2
    plain = dict(Encoder(FakeModel()).stream_images(PICTURES))  # type: ignore[arg-type]
    assert list(made) == list(plain) == ["a", "b"]
    for key in plain:
        np.testing.assert_array_equal(made[key].vector, plain[key].vector)  # type: ignore[union-attr]
    assert short.embed_queries(RED).shape == (1, 8)
    np.testing.assert_array_equal(known.embed_queries(RED), known.embed_documents(RED))
    assert short.load_seconds == known.load_seconds > 0
    assert len(loads) == 2, "truncated encoders share the model"


def test_more_dimensions_than_the_model_has_are_wrong_usage(folder: Path, loads: list[FakeModel]) -> None:
    for encoder in (LazyEncoder(folder, dimension=49), LazyEncoder(folder).truncate(49)):
        with pytest.raises(UsageError, match="embeddings of 48 dimensions, not of 49"):
            _ = encoder.dimension


def test_a_model_of_texts_alone_is_refused_also_when_it_is_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda *_, **__: FakeModel(modalities=["text"]))
    for _ in range(2):
        with pytest.raises(CocoaError, match="does not embed images"):
            LazyEncoder(folder).require_images()
        monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda *_, **__: pytest.fail("loaded"))
