"""After changes, failures and kills, the next run leaves a collection that matches the files exactly."""

import os
import random
import resource
import shutil
import threading
import tracemalloc
import uuid
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from fake_model import FakeModel, colour_image
from hostile_files import write_hostile_files
from other_processes import SECONDS_PER_IMAGE, Location, index_slowly, index_with_little_disk, run, run_and_kill
from PIL import Image
from qdrant_client import QdrantClient

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant import IndexSummary, QdrantIndexer
from cocoa_embed.integrations.qdrant.indexing import writer
from cocoa_embed.integrations.qdrant.indexing.embed_records import NewPoint
from cocoa_embed.integrations.qdrant.indexing.merge import Merger
from cocoa_embed.integrations.qdrant.points import describe, location_of, make_payload
from cocoa_embed.integrations.qdrant.stores.base import Point
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources import files
from cocoa_embed.sources.base import Record, storable

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
    added = after.keys() - before.keys()
    assert (summary.replaced, summary.failed) == (len(changed), [])
    assert summary.indexed + summary.updated == len(added)
    assert summary.updated >= len(moved)
    # The first file of a new content counts as indexed, unless it replaces another content.
    new = set(after.values()) - set(before.values())
    assert len(new - {after[file] for file in changed}) <= summary.indexed <= len(new)
    assert summary.unchanged == len(after) - len(changed) - len(added)


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
        assert indexer.search(image=file, limit=1)[0].score == pytest.approx(1, abs=1e-5)


@pytest.fixture
def index() -> QdrantIndexer:
    return QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"), batch_size=4)


@pytest.fixture(params=["path", "edge"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A storage backend in a folder."""
    return {request.param: str(tmp_path / "store")}


def assert_a_run_finishes(location: Location, folder: ChangingFolder) -> None:
    with QdrantIndexer(FakeModel(), **location) as index:
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


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_are_finished_by_the_next(tmp_path: Path, location: Location, seed: int) -> None:
    moments = random.Random(seed)
    folder = ChangingFolder(tmp_path / "pictures", seed, count=40)
    killed = 0
    for _ in range(5):
        killed += run_and_kill(moments.uniform(0, 20 * SECONDS_PER_IMAGE), index_slowly, location, folder.folder)[0]
        folder.change(5)
    assert killed >= 2
    assert_a_run_finishes(location, folder)


def test_a_full_disk_is_reported_in_one_sentence_and_the_next_run_finishes(tmp_path: Path, location: Location) -> None:
    folder = ChangingFolder(tmp_path / "pictures", seed=0, count=60)
    (error,) = run(index_with_little_disk, location, folder.folder, 64 * 1024)
    assert str(tmp_path / "store") in error
    assert "\n" not in error
    assert_a_run_finishes(location, folder)


def test_points_are_written_once_by_as_many_threads_as_the_store_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BATCH_POINTS", 4)
    barrier, stored, threads = threading.Barrier(3), dict[str, dict[str, Any]](), list[int]()

    def insert(points: Sequence[Point]) -> None:
        barrier.wait(60)
        threads.append(threading.get_ident())
        stored.update((point.id, point.payload) for point in points)

    store = Mock(parallel=3, insert=insert, retrieve=lambda ids: {id_: stored[id_] for id_ in ids})
    records = [Record(f"/{number}.png", f"{number}.png", bytes) for number in range(46)]
    with writer.Writer(store, Merger(lambda _: False), lambda batch, lost: None) as writing:
        for number, record in enumerate(records):
            payload = make_payload({"sha256": str(number)}, [location_of(record)], describe(record))
            writing.insert(NewPoint(Point(str(number), np.zeros(2, np.float32), payload), [record]))
        writing.finish()
    assert sorted(stored, key=int) == [str(number) for number in range(46)]
    assert (len(threads), len(set(threads))) == (12, 3)
    store.replace_payloads.assert_not_called()


@pytest.mark.parametrize("fault", ["before", "half", "after"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_store_that_fails_in_the_middle_is_reported_and_the_next_run_finishes(
    tmp_path: Path, index: QdrantIndexer, monkeypatch: pytest.MonkeyPatch, fault: str, at: int
) -> None:
    monkeypatch.setattr(writer, "BATCH_POINTS", 4)
    folder = ChangingFolder(tmp_path / "pictures", seed=0)
    insert, faults = index.store.insert, list[str | None]()

    def fail_once(points: Sequence[Point]) -> None:
        next_fault = faults.pop(0) if faults else None
        insert(points[: {"before": 0, "half": len(points) // 2}.get(next_fault, len(points))])
        if next_fault is not None:
            raise CocoaError(f"the server timed out ({fault})")

    monkeypatch.setattr(index.store, "insert", fail_once)
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
    read = files.read_stable_file

    def interfere(path: Path) -> bytes:
        if path in doomed:
            path.unlink()
        content = read(path)
        if path in altered:
            colour_image("red", (50 + altered.index(path), 7)).save(path)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(files, "read_stable_file", interfere)
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
    assert all(reason in failed[path] and failed[path].isprintable() for path, reason in bad.items())
    assert all("cannot be embedded" in failed[path] for path in refused_by_models)
    stored = {path for _, payload in index.store.scan(["paths"]) for path in payload["paths"]}
    assert stored == {storable(path) for path in good}

    again = index.index(tmp_path / "hostile", prune=True, progress=False)
    assert (again.unchanged, again.pruned) == (len(good), 0)
    assert {failure["path"] for failure in again.failed} == failed.keys()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(3_000):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{number}.bmp")
    model, memory, stored = FakeModel(), list[int](), dict[str, dict[str, Any]]()
    model.documents = deque(maxlen=0)  # remembers nothing
    index = QdrantIndexer(model, batch_size=50)
    index.store = Mock(
        place=None, location="nowhere", collection="images", parallel=1, **{"signature.return_value": None}
    )
    index.store.by_paths.return_value = {}
    index.store.retrieve = lambda ids: {id_: stored[id_] for id_ in ids if id_ in stored}

    def insert(points: Sequence[Point]) -> None:
        memory.append(tracemalloc.get_traced_memory()[0])
        stored.clear()
        stored.update((point.id, point.payload) for point in points)

    index.store.insert = insert
    tracemalloc.start()
    assert index.index(tmp_path, progress=False).indexed == 3_000
    tracemalloc.stop()
    assert (memory[40] - memory[10]) / (30 * writer.BATCH_POINTS) < 150, "bytes per file"


@pytest.mark.usefixtures("few_payload_indexes")
@pytest.mark.parametrize("location", ["path", "edge"])
def test_points_of_others_with_a_copied_payload_are_left_alone(tmp_path: Path, location: str) -> None:
    """As LlamaIndex writes them for ``TextNode(text=summary, metadata=hit.node.metadata)``."""
    (tmp_path / "pictures").mkdir()
    colour_image("red").save(tmp_path / "pictures" / "red.bmp")
    with QdrantIndexer(FakeModel(), **{location: tmp_path / "index"}) as indexer:
        indexer.index(tmp_path / "pictures", progress=False)
        ((_, payload),) = indexer.store.scan(None)
        other, note = str(uuid.uuid4()), {**payload, "_node_content": "{}", "_node_type": "TextNode"}
        indexer.store.insert([Point(other, np.ones(48, np.float32), note)])
        again = indexer.index(tmp_path / "pictures", prune=True, progress=False)
        assert (again.unchanged, again.replaced, again.pruned) == (1, 0, 0)
        (tmp_path / "pictures" / "red.bmp").unlink()
        assert indexer.index(tmp_path / "pictures", prune_all=True, progress=False).pruned == 1
        assert indexer.forget(tmp_path / "pictures").deleted == 0
        assert [id_ for id_, _ in indexer.store.scan([])] == [other]
