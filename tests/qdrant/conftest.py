"""A collection in memory and a folder of four images, for the tests of the indexer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import colour_image, write_colours

qdrant_client = pytest.importorskip("qdrant_client")


@pytest.fixture
def client() -> Iterator[Any]:
    client = qdrant_client.QdrantClient(":memory:")
    yield client
    client.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    write_colours(folder, "red", "green", "blue")
    (folder / "sub").mkdir()
    colour_image("yellow").save(folder / "sub" / "yellow.jpg")
    return folder
