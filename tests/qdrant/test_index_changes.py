"""Whatever happens to the files between runs, the collection holds exactly what is there."""

from pathlib import Path

import pytest
from changing_folder import ChangingFolder, assert_exactly
from fake_model import FakeModel

pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient

from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer


@pytest.mark.parametrize("seed", range(8))
def test_after_any_changes_a_run_leaves_exactly_the_right_points(tmp_path: Path, seed: int) -> None:
    folder = ChangingFolder(tmp_path / "pictures", seed)
    index = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"))
    for round_ in range(6):
        summary = index.index(folder.folder, prune=True, progress=False)
        files = folder.files
        assert_exactly(index.store, files, index)
        assert summary.failed == []
        counted = summary.indexed + summary.unchanged + summary.updated + summary.replaced
        assert counted == len(files)
        again = index.index(folder.folder, prune=True, progress=False)
        assert (again.unchanged, again.pruned) == (len(files), 0), f"round {round_} was not finished"
        folder.change(10)


@pytest.mark.parametrize("seed", range(4))
def test_without_pruning_only_what_is_gone_is_left_too_many(tmp_path: Path, seed: int) -> None:
    folder = ChangingFolder(tmp_path / "pictures", seed)
    index = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"))
    for _ in range(4):
        index.index(folder.folder, progress=False)
        folder.change(10)
    index.index(folder.folder, progress=False)
    there = {str(file) for file in folder.files}
    named = {path for _, payload in index.store.scan(["paths"]) for path in payload["paths"]}
    assert there <= named
    pruned = index.index(folder.folder, prune=True, progress=False).pruned
    assert pruned == len(named - there)
    assert_exactly(index.store, folder.files, index)
