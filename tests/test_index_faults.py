"""Kills, full disks and failing stores: after another run the collection holds exactly the right points."""

import random
from pathlib import Path

import pytest

from changing_folder import ChangingFolder, assert_exactly
from fake_model import FakeModel
from killed_runs import SECONDS_PER_IMAGE, run_and_kill

pytest.importorskip("qdrant_client")

from cocoa_embed.integrations.qdrant import QdrantIndexer


@pytest.mark.parametrize("home", ["path", "edge"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_are_finished_by_the_next(tmp_path: Path, home: str, seed: int) -> None:
    if home == "edge":
        pytest.importorskip("qdrant_edge")
    moments = random.Random(seed)
    folder = ChangingFolder(tmp_path / "pictures", seed, count=40)
    place = {home: str(tmp_path / "store")}
    killed = 0
    for _ in range(8):
        killed += run_and_kill(place, folder.folder, moments.uniform(0, 20 * SECONDS_PER_IMAGE))
        folder.change(5)
    assert killed >= 4
    with QdrantIndexer(FakeModel(), **place) as index:
        index.index(folder.folder, prune=True, progress=False)
        assert_exactly(index.store, folder.files, index)
        again = index.index(folder.folder, prune=True, progress=False)
        assert again.unchanged == len(folder.files)
