"""Kills, full disks and failing stores: after another run the collection holds exactly the right points."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from changing_folder import ChangingFolder, assert_exactly
from fake_model import FakeModel, colour_image
from other_processes import SECONDS_PER_IMAGE, index_in_another_process, run_and_kill, run_on_a_full_disk

pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient

from cocoa_embed.errors import CocoaError
from cocoa_embed.images.load import FileContent
from cocoa_embed.integrations.qdrant import read_files as reading
from cocoa_embed.integrations.qdrant import writer
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.integrations.qdrant.stores.base import Point, Store

HOMES = ["path", "edge"]


def home_of(home: str, tmp_path: Path) -> dict[str, str]:
    if home == "edge":
        pytest.importorskip("qdrant_edge")
    return {home: str(tmp_path / "store")}


def assert_a_run_finishes(place: dict[str, str], folder: ChangingFolder) -> None:
    with QdrantIndexer(FakeModel(), **place) as index:
        index.index(folder.folder, prune=True, progress=False)
        assert_exactly(index.store, folder.files, index)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_are_finished_by_the_next(tmp_path: Path, home: str, seed: int) -> None:
    place = home_of(home, tmp_path)
    moments = random.Random(seed)
    folder = ChangingFolder(tmp_path / "pictures", seed, count=40)
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


@pytest.mark.parametrize("home", HOMES)
def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(tmp_path: Path, home: str) -> None:
    place = home_of(home, tmp_path)
    folder = ChangingFolder(tmp_path / "pictures", seed=0, count=60)
    error = run_on_a_full_disk(place, folder.folder, bytes_a_file=64 * 1024)
    assert str(tmp_path / "store") in error
    assert "\n" not in error
    assert_a_run_finishes(place, folder)


@pytest.mark.parametrize("home", HOMES)
def test_a_second_process_is_refused_and_harms_nothing(tmp_path: Path, home: str) -> None:
    place = home_of(home, tmp_path)
    folder = ChangingFolder(tmp_path / "pictures", seed=0)
    with index_in_another_process(place, folder.folder), pytest.raises(CocoaError, match="in use by another process"):
        QdrantIndexer(FakeModel(), **place).index(folder.folder, progress=False)
    assert_a_run_finishes(place, folder)


class FaultyStore:
    """A store whose upserts fail as the test says; everything else goes through."""

    def __init__(self, store: Store, faults: Iterable[str | None]) -> None:
        self._store = store
        self._faults = iter(faults)

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def upsert(self, points: Sequence[Point]) -> None:
        fault = next(self._faults, None)
        if fault == "half":
            self._store.upsert(points[: len(points) // 2])
        if fault == "after":
            self._store.upsert(points)
        if fault is not None:
            raise CocoaError(f"the server timed out ({fault})")
        self._store.upsert(points)


@pytest.mark.parametrize("fault", ["before", "half", "after"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_store_that_fails_in_the_middle_is_told_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, at: int
) -> None:
    monkeypatch.setattr(writer, "POINTS_AT_ONCE", 4)
    folder = ChangingFolder(tmp_path / "pictures", seed=0)
    index = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"), batch_size=4)
    whole = index.store
    for _ in range(2):
        index.store = FaultyStore(whole, [*[None] * at, fault])
        with pytest.raises(CocoaError, match=f"timed out \\({fault}\\)"):
            index.index(folder.folder, prune=True, progress=False)
        folder.add()
        folder.alter()
    index.store = whole
    index.index(folder.folder, prune=True, progress=False)
    assert_exactly(index.store, folder.files, index)


def test_files_that_vanish_while_a_run_is_at_work_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ChangingFolder(tmp_path / "pictures", seed=0)
    doomed = set(folder.files[::5])
    read = reading.read_stable_file

    def read_late(path: Path) -> FileContent:
        if path in doomed:
            path.unlink()
        return read(path)

    monkeypatch.setattr(reading, "read_stable_file", read_late)
    index = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"))
    summary = index.index(folder.folder, progress=False)
    assert {(failure["path"], failure["reason"]) for failure in summary.failed} == {
        (str(path), "does not exist") for path in doomed
    }
    assert_exactly(index.store, folder.files, index)


def test_a_file_that_changes_between_two_looks_is_stored_as_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ChangingFolder(tmp_path / "pictures", seed=0)
    read = reading.read_stable_file
    altered: list[Path] = []

    def read_and_alter(path: Path) -> FileContent:
        content = read(path)
        if len(altered) < 3:
            altered.append(path)
            colour_image("red", (50 + len(altered), 7)).save(path)
        return content

    monkeypatch.setattr(reading, "read_stable_file", read_and_alter)
    index = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"))
    index.index(folder.folder, progress=False)
    assert index.index(folder.folder, prune=True, progress=False).replaced == 3
    assert_exactly(index.store, folder.files, index)
