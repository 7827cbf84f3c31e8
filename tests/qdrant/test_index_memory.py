"""The memory of a long run: what the indexer itself holds, without what a store keeps of its points."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel
from PIL import Image

pytest.importorskip("qdrant_client")

from cocoa_embed.integrations.qdrant import indexer as qdrant
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.integrations.qdrant.stores.base import Payload, Point, Signature

FILES = 10_000
WARM = 1000
BYTES_A_FILE = 1500
"""What is remembered of a file: its path, time and content, to tell copies."""


def resident_bytes() -> int:
    """Return the memory of this process that is not backed by files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class ForgetfulStore:
    """Takes points and keeps none."""

    place, collection, parallel = "nowhere", "images", 1

    def __init__(self, **_: object) -> None:
        self.taken = 0

    def signature(self) -> Signature | None:
        return None

    def create(self, signature: Signature) -> None:
        pass

    def scan(self, keys: Sequence[str]) -> Iterator[tuple[str, Payload]]:
        return iter(())

    def upsert(self, points: Sequence[Point]) -> None:
        self.taken += len(points)

    def finish(self) -> None:
        pass


class WatchedModel(FakeModel):
    """Notes the memory at each batch, and forgets the images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.memory: list[tuple[int, int]] = []

    def __call__(self, features: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
        self.documents.clear()
        self.seen += len(features["items"])
        self.memory.append((self.seen, resident_bytes()))
        return super().__call__(features, task)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory is read from /proc")
def test_memory_does_not_grow_with_the_files_beyond_what_is_remembered_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    for number in range(FILES):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{number:05}.bmp")
    monkeypatch.setattr(qdrant, "open_store", ForgetfulStore)
    model = WatchedModel()
    index = QdrantIndexer(model)
    assert index.index(tmp_path, progress=False).indexed == index.store.taken == FILES
    warm = next(memory for seen, memory in model.memory if seen >= WARM)
    grown = model.memory[-1][1] - warm
    assert grown < BYTES_A_FILE * (FILES - WARM), f"{grown / (FILES - WARM):.0f} bytes a file"
