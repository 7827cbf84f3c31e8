from pathlib import Path

import pytest
from fake_model import FakeModel


@pytest.fixture
def fake_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder ``fake`` in a new working folder is loaded as a model of colours, while a library prints something."""

    def load(*_: object, **__: object) -> FakeModel:
        print("a library says hello")  # noqa: T201
        return FakeModel()

    monkeypatch.chdir(tmp_path)
    Path("fake").mkdir()
    for file in ("fake/modules.json", "fake/model.safetensors"):
        Path(file).touch()
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", load)
