"""A folder of every kind of hostile and broken file, among good ones, through the indexer."""

import resource
from pathlib import Path

import pytest
from fake_model import FakeModel
from hostile_files import write_hostile_files

pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient

from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.integrations.qdrant.points import storable

MAX_GROWTH_BYTES = 1500 * 2**20


def peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_every_good_file_is_indexed_and_every_bad_one_is_told_with_its_reason(tmp_path: Path) -> None:
    files = write_hostile_files(tmp_path / "hostile")
    assert len({file.kind for file in files}) >= 40
    refused_by_models = {str(file.path) for file in files if file.kind.startswith("long")}
    bad = {str(file.path): file.reason_part for file in files if not file.is_good}
    good = {str(file.path) for file in files if file.is_good} - refused_by_models
    index = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"))

    before = peak_memory_bytes()
    summary = index.index(tmp_path / "hostile", progress=False)
    assert peak_memory_bytes() - before < MAX_GROWTH_BYTES

    failed = {failure["path"]: failure["reason"] for failure in summary.failed}
    assert failed.keys() == bad.keys() | refused_by_models
    for path, reason_part in bad.items():
        assert reason_part in failed[path]
        assert failed[path].isprintable()
    assert all("cannot be embedded" in failed[path] for path in refused_by_models)
    stored = {path for _, payload in index.store.scan(["paths"]) for path in payload["paths"]}
    assert stored == {storable(path) for path in good}

    again = index.index(tmp_path / "hostile", prune=True, progress=False)
    assert (again.unchanged, again.pruned) == (len(good), 0)
    assert {failure["path"] for failure in again.failed} == failed.keys()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_bad_files_cost_the_good_ones_of_their_batch_nothing(tmp_path: Path, batch_size: int) -> None:
    files = write_hostile_files(tmp_path / "hostile")
    vectors = []
    for size in (batch_size, 64):
        client = QdrantClient(":memory:")
        QdrantIndexer(FakeModel(), client=client, batch_size=size).index(tmp_path / "hostile", progress=False)
        points, _ = client.scroll("images", limit=1000, with_vectors=True)
        vectors.append({point.id: point.vector for point in points})
    assert vectors[0] == vectors[1]
    assert len(vectors[0]) > sum(file.is_good for file in files) / 2
