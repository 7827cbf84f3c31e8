from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import write_colours
from served import index_files, served
from starlette.testclient import TestClient

pytest.importorskip("qdrant_client")


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A folder of four pictures, each of one colour, with captions."""
    folder = tmp_path / "colours"
    write_colours(folder, "red", "green", "blue", "yellow")
    lines = [f'{{"file_name": "{name}.png", "text": "all {name}", "shop": "{name[0]}"}}' for name in ("red", "blue")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> dict[str, Any]:
    return {"path": tmp_path / "index"}


@pytest.fixture
def index(colours: Path, storage: dict[str, Any]) -> dict[str, Any]:
    """The storage, with an index of the four pictures."""
    index_files(storage, colours)
    return storage


@pytest.fixture
def api(index: dict[str, Any]) -> Iterator[TestClient]:
    """The API over the four pictures."""
    with served(index) as client:
        yield client
