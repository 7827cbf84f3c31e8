"""After changes, failures and kills, the next run leaves a collection that matches the files exactly."""

import os
import random
import resource
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from fake_model import FakeModel, colour_image
from hostile_files import write_hostile_files
from other_processes import (
    SECONDS_PER_IMAGE,
    Location,
    index_slowly,
    index_with_little_disk,
    run,
    run_and_kill,
)
from PIL import Image
from qdrant_client import QdrantClient

from cocoa_embed.errors import CocoaError
from cocoa_embed.images.load import FileContent
from cocoa_embed.integrations.qdrant import IndexSummary, QdrantIndexer, index_run, writer
from cocoa_embed.integrations.qdrant.points import storable
from cocoa_embed.integrations.qdrant.stores.base import Point
from cocoa_embed.integrations.qdrant.stores.store import Store

MEBIBYTE = 2**20


class ChangingFolder:
    """Images that are added, changed, copied, renamed, swapped, touched and removed at random."""

    def __init__(self, folder: Path, seed: int, count: int = 30) -> None:
        self.folder = folder
        (folder / "sub").mkdir(parents=True)
        self._random = random.Random(seed)
        self._made = 0
        for _ in range(count):
            self.add()

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("*.bmp"))

    @property
    def contents(self) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in self.files}

    def change(self, times: int) -> None:
        for _ in range(times):
            changes = (self.add, self.add, self.alter, self.copy, self.rename, self.swap, self.touch, self.remove)
            self._random.choice(changes)()

    def add(self) -> None:
        self._paint(self._new(self._random.choice([".", "sub"])))

    def alter(self) -> None:
        """Paint an image again: in the same number of bytes, or with the same time of modification."""
        file = self._any()
        status = file.stat()
        self._paint(file, height=self._random.choice([8, 9 + self._made]))
        if file.stat().st_size != status.st_size:
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def copy(self) -> None:
        shutil.copyfile(self._any(), self._new())

    def rename(self) -> None:
        self._any().rename(self._new("sub"))

    def swap(self) -> None:
        one, other = self._random.sample(self.files, 2)
        one.rename(self.folder / "x")
        other.rename(one)
        (self.folder / "x").rename(other)

    def touch(self) -> None:
        os.utime(self._any(), (0, self._random.random() * 1e9))

    def remove(self) -> None:
        if len(self.files) > 5:
            self._any().unlink()

    def _any(self) -> Path:
        return self._random.choice(self.files)

    def _new(self, folder: str = ".") -> Path:
        self._made += 1
        return self.folder / folder / f"{self._made}.bmp"

    def _paint(self, path: Path, height: int = 8) -> None:
        Image.new("RGB", (8, height), tuple(self._random.randbytes(3))).save(path)


def assert_counts(summary: IndexSummary, before: Mapping[Path, bytes], after: Mapping[Path, bytes]) -> None:
    """Assert that a summary counts what has changed between two states of a folder."""
    changed = {file for file, content in after.items() if before.get(file, content) != content}
    moved = {file for file, content in after.items() if file not in before and content in before.values()}
    new = set(after.values()) - set(before.values()) - {after[file] for file in changed}
    assert (summary.replaced, summary.updated, summary.failed) == (len(changed), len(moved), [])
    # A copy of new content counts once or twice, as it comes in the same batch or later.
    assert summary.indexed >= len(new)
    assert summary.indexed + summary.unchanged == len(after) - len(changed) - len(moved)


def assert_exactly(store: Store, files: list[Path], indexer: QdrantIndexer) -> None:
    """Assert that a store holds a point for each content of the files, right in every part, and nothing else."""
    stored = dict(store.scan(["path", "paths", "mtimes", "mtime", "sha256", "bytes"]))
    contents: dict[bytes, set[str]] = defaultdict(set)
    for file in files:
        contents[file.read_bytes()].add(str(file))
    assert len(stored) == len(contents) == store.count()
    assert {frozenset(payload["paths"]) for payload in stored.values()} == set(map(frozenset, contents.values()))
    for payload in stored.values():
        assert payload["path"] == payload["paths"][0]
        assert len(payload["paths"]) == len(set(payload["paths"]))
        for path, mtime in zip(payload["paths"], payload["mtimes"], strict=True):
            assert abs(Path(path).stat().st_mtime - mtime) < 1e-6
            assert Path(path).stat().st_size == payload["bytes"]
    for file in files[::7]:
        best = indexer.search(image=file, limit=1)[0]
        assert np.isclose(best.score, 1, atol=1e-5)


@pytest.fixture
def index() -> QdrantIndexer:
    return QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"), batch_size=4)


@pytest.fixture(params=["path", "edge"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A storage backend in a folder."""
    return {request.param: str(tmp_path / "store")}


def assert_a_run_finishes(location: Location, folder: ChangingFolder) -> None:
    with QdrantIndexer(FakeModel(), **location) as index:  # type: ignore[arg-type]
        index.index(folder.folder, prune=True, progress=False)
        assert_exactly(index.store, folder.files, index)
        assert index.index(folder.folder, prune=True, progress=False).unchanged == len(folder.files)


@pytest.mark.parametrize("seed", range(6))
def test_after_any_changes_a_run_leaves_exactly_the_right_points(
    tmp_path: Path, index: QdrantIndexer, seed: int
) -> None:
    folder = ChangingFolder(tmp_path / "pictures", seed)
    before: dict[Path, bytes] = {}
    embedded: set[bytes] = set()
    for _ in range(6):
        after = folder.contents
        assert_counts(index.index(folder.folder, prune=True, progress=False), before, after)
        assert_exactly(index.store, folder.files, index)
        again = index.index(folder.folder, prune=True, progress=False)
        assert (again.unchanged, again.pruned) == (len(after), 0)
        embedded |= set(after.values())
        assert len(index.encoder.model.documents) == len(embedded), "each content is embedded once"
        before = after
        folder.change(10)
    index.index(folder.folder, progress=False)
    stored = {path for _, payload in index.store.scan(["paths"]) for path in payload["paths"]}
    deleted = stored - {str(file) for file in folder.files}
    assert len(stored) - len(deleted) == len(folder.files), "without pruning, only deleted files remain"
    assert index.index(folder.folder, prune=True, progress=False).pruned == len(deleted)
    assert_exactly(index.store, folder.files, index)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_are_finished_by_the_next(tmp_path: Path, location: Location, seed: int) -> None:
    moments = random.Random(seed)
    folder = ChangingFolder(tmp_path / "pictures", seed, count=40)
    killed = 0
    for _ in range(5):
        killed += run_and_kill(moments.uniform(0, 20 * SECONDS_PER_IMAGE), index_slowly, location, folder.folder)[0]
        folder.change(5)
    assert killed >= 2
    assert_a_run_finishes(location, folder)


def test_a_full_disk_is_one_sentence_and_the_next_run_finishes(tmp_path: Path, location: Location) -> None:
    folder = ChangingFolder(tmp_path / "pictures", seed=0, count=60)
    (error,) = run(index_with_little_disk, location, folder.folder, 64 * 1024)
    assert str(tmp_path / "store") in error
    assert "\n" not in error
    assert_a_run_finishes(location, folder)


@pytest.mark.parametrize("fault", ["before", "half", "after"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_store_that_fails_in_the_middle_is_reported_and_the_next_run_finishes(
    tmp_path: Path, index: QdrantIndexer, monkeypatch: pytest.MonkeyPatch, fault: str, at: int
) -> None:
    monkeypatch.setattr(writer, "BATCH_POINTS", 4)
    folder = ChangingFolder(tmp_path / "pictures", seed=0)
    upsert, faults = index.store.upsert, list[str | None]()

    def fail_once(points: Sequence[Point]) -> None:
        next_fault = faults.pop(0) if faults else None
        upsert(points[: {"before": 0, "half": len(points) // 2}.get(next_fault, len(points))])
        if next_fault is not None:
            raise CocoaError(f"the server timed out ({fault})")

    monkeypatch.setattr(index.store, "upsert", fail_once)
    for _ in range(2):
        faults += [*[None] * at, fault]
        with pytest.raises(CocoaError, match=f"timed out \\({fault}\\)"):
            index.index(folder.folder, prune=True, progress=False)
        index.index(folder.folder, prune=True, progress=False)
        assert_exactly(index.store, folder.files, index)
        for _ in range(20):
            folder.alter()


def test_files_that_are_deleted_or_change_during_a_run_are_reported_or_replaced_by_the_next(
    tmp_path: Path, index: QdrantIndexer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ChangingFolder(tmp_path / "pictures", seed=0)
    doomed, altered = folder.files[::5], folder.files[1::10]
    read = index_run.read_stable_file

    def interfere(path: Path) -> FileContent:
        if path in doomed:
            path.unlink()
        content = read(path)
        if path in altered:
            colour_image("red", (50 + altered.index(path), 7)).save(path)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(index_run, "read_stable_file", interfere)
        failed = index.index(folder.folder, progress=False).failed
    assert failed == [{"path": str(path), "reason": "does not exist"} for path in doomed]
    assert index.index(folder.folder, prune=True, progress=False).replaced == len(altered) == 3
    assert_exactly(index.store, folder.files, index)


def test_hostile_files_are_indexed_or_reported_in_bounded_memory(tmp_path: Path, index: QdrantIndexer) -> None:
    files = write_hostile_files(tmp_path / "hostile")
    assert len({file.kind for file in files}) >= 40
    refused_by_models = {str(file.path) for file in files if file.kind.startswith("long")}
    bad = {str(file.path): file.reason_part for file in files if not file.is_good}
    good = {str(file.path) for file in files if file.is_good} - refused_by_models

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = index.index(tmp_path / "hostile", progress=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1500 * MEBIBYTE / 1024

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


class WatchedModel(FakeModel):
    """Records the anonymous memory of this process at each batch, and forgets the images."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[int] = []

    def __call__(self, features: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
        self.documents.clear()
        status = Path("/proc/self/status").read_text()
        self.memory.append(int(status.partition("RssAnon:")[2].split()[0]) * 1024)
        return super().__call__(features, task)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory is read from /proc")
def test_memory_grows_only_by_what_is_kept_of_each_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(10_000):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{number:05}.bmp")
    model = WatchedModel()
    index = QdrantIndexer(model, batch_size=50)
    index.store = Mock(location="nowhere", collection="images", parallel=1, **{"signature.return_value": None})
    index.store.scan.return_value = ()
    index.store.upsert = lambda points: None  # a mock would keep them
    assert index.index(tmp_path, progress=False).indexed == 10_000
    assert (model.memory[-1] - model.memory[20]) / 9000 < 1500, "bytes per file"
