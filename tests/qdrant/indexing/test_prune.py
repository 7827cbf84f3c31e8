"""What --prune removes, what it refuses to remove, and what is removed by name."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unicodedata import normalize

import pytest
from fake_model import FakeModel
from PIL import Image
from qdrant_client import QdrantClient
from source_files import tar
from table_files import png

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant import IndexSummary, QdrantIndexer
from cocoa_embed.sources.base import storable

COUNT = 20
Form: TypeAlias = Literal["NFC", "NFD"]


class Disk:
    """A folder of pictures with subfolders, indexed into a collection."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.indexer = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"))
        self.paint(folder, COUNT)

    def paint(self, folder: Path, count: int, first: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            Image.new("RGB", (8, 8), (number, 100, 200 - number)).save(folder / f"{number}.bmp")

    def run(self, *folders: Path, **options: Any) -> IndexSummary:
        return self.indexer.index(folders or [self.folder], progress=False, **options)

    @property
    def paths(self) -> set[str]:
        return {path for _, payload in self.indexer.store.scan(["paths"]) for path in payload["paths"]}


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    disk = Disk(tmp_path / "mnt" / "disk")
    assert disk.run().indexed == COUNT
    return disk


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def with_lost_and_found(folder: Path) -> None:
    empty(folder)
    (folder / "lost+found").mkdir()


def with_other_files(folder: Path) -> None:
    empty(folder)
    (folder / "README").touch()


def dangling(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("/nowhere/at/all")


@pytest.mark.parametrize("unmount", [empty, with_lost_and_found, with_other_files, dangling, shutil.rmtree])
def test_an_unmounted_disk_loses_no_points_unless_requested(disk: Disk, unmount: Callable[[Path], None]) -> None:
    before = disk.paths
    unmount(disk.folder)
    summary = disk.run(prune=True)
    assert (summary.pruned, disk.paths) == (0, before)
    assert {failure["path"] for failure in summary.failed} == {str(disk.folder)}
    assert any("--prune-all" in failure["reason"] for failure in summary.failed)
    summary = disk.run(prune_all=True)
    assert (summary.pruned, disk.paths) == (COUNT, set())


def test_another_disk_under_the_same_name_replaces_nothing(disk: Disk) -> None:
    empty(disk.folder)
    disk.paint(disk.folder, 5, first=100)
    for number in range(5):
        (disk.folder / f"{100 + number}.bmp").rename(disk.folder / f"new{number}.bmp")
    summary = disk.run(prune=True)
    assert (summary.indexed, summary.pruned, len(disk.paths)) == (5, 0, COUNT + 5)
    assert summary.failed[0]["reason"].startswith("20 of its 25 points would be pruned")


@pytest.mark.parametrize(("deleted", "pruned"), [(6, 6), (7, 0)])
def test_up_to_three_in_ten_points_are_pruned(disk: Disk, deleted: int, pruned: int) -> None:
    for number in range(deleted):
        (disk.folder / f"{number}.bmp").unlink()
    summary = disk.run(prune=True)
    assert (summary.pruned, len(summary.failed)) == (pruned, pruned == 0)
    assert len(disk.paths) == COUNT - pruned


def test_one_of_two_pictures_may_be_pruned_but_not_the_last(disk: Disk, tmp_path: Path) -> None:
    two = tmp_path / "two"
    disk.paint(two, 2, first=100)
    disk.run(two)
    (two / "100.bmp").unlink()
    assert disk.run(two, prune=True).pruned == 1
    (two / "101.bmp").unlink()
    assert (disk.run(two, prune=True).pruned, disk.run(two, prune_all=True).pruned) == (0, 1)


def replaced_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


UNMOUNTED = {
    empty: "is empty",
    with_lost_and_found: "is empty",
    dangling: "is a link that leads nowhere",
    replaced_by_a_file: "cannot be listed (Not a directory)",
}


@pytest.mark.parametrize("unmount", UNMOUNTED)
def test_an_empty_subfolder_is_not_pruned_and_the_rest_is(disk: Disk, unmount: Callable[[Path], None]) -> None:
    mounted = disk.folder / "holidays" / "stick"
    disk.paint(mounted / "2026", 2, first=100)
    disk.run()
    unmount(mounted)
    (disk.folder / "3.bmp").unlink()
    summary = disk.run(prune=True)
    assert (summary.pruned, len(disk.paths)) == (1, COUNT + 1)
    (failure,) = summary.failed
    assert failure["path"] == str(mounted)
    assert failure["reason"].startswith(f"{UNMOUNTED[unmount]}, and 2 images below it would be pruned")
    assert disk.run(prune_all=True).pruned == 2


def test_a_deleted_subfolder_is_pruned(disk: Disk) -> None:
    disk.paint(disk.folder / "trip", 3, first=100)
    disk.run()
    shutil.rmtree(disk.folder / "trip")
    summary = disk.run(prune=True)
    assert (summary.pruned, summary.failed) == (3, [])


def test_one_of_several_roots_is_refused_alone(disk: Disk, tmp_path: Path) -> None:
    other = tmp_path / "other"
    disk.paint(other, 10, first=100)
    disk.run(disk.folder, other)
    empty(disk.folder)
    (other / "100.bmp").unlink()
    summary = disk.run(disk.folder, other, prune=True)
    assert summary.pruned == 1
    assert [failure["path"] for failure in summary.failed] == [str(disk.folder)]


@pytest.mark.parametrize(("part", "verb", "unchanged"), [("", "read", 0), ("sub", "listed", COUNT)])
def test_a_folder_that_cannot_be_read_is_reported_and_keeps_its_points(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, part: str, verb: str, unchanged: int
) -> None:
    def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: str | Path, **options: object) -> object:
            if f"{path}/".startswith(f"{unreadable}/"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, **options)

        return call

    disk.paint(disk.folder / "sub", 2, first=100)
    disk.run()
    unreadable = disk.folder / part
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse(os.scandir))
        patch.setattr(os, "stat", refuse(os.stat))
        summary = disk.run(prune_all=True)
    assert (summary.unchanged, summary.pruned, len(disk.paths)) == (unchanged, 0, COUNT + 2)
    assert summary.failed == [{"path": str(unreadable), "reason": f"cannot be {verb} (Permission denied)"}]


@pytest.mark.parametrize("option", ["prune", "prune_all"])
def test_a_name_that_neither_the_disk_nor_the_index_knows_is_reported(disk: Disk, tmp_path: Path, option: str) -> None:
    summary = disk.run(disk.folder, tmp_path / "typo", **{option: True})
    assert summary.failed == [
        {"path": str(tmp_path / "typo"), "reason": "does not exist, and the index has nothing below it"}
    ]
    assert len(disk.paths) == COUNT


def test_an_archive_that_is_named_itself_is_pruned_when_it_is_gone(disk: Disk, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar([("x.png", png(1)), ("sub/y.png", png(2))]))
    disk.run(archive)
    archive.unlink()
    (failure,) = disk.run(archive, prune=True).failed
    assert failure["reason"].startswith("has no images, and 2 of its 2 points would be pruned")
    assert disk.run(archive, disk.folder, prune_all=True).pruned == 2
    assert len(disk.paths) == COUNT


class TestMoved:
    def test_the_path_of_a_moved_folder_is_the_one_that_exists_and_the_old_one_is_pruned_by_name(
        self, disk: Disk, tmp_path: Path
    ) -> None:
        new = tmp_path / "new"
        disk.folder.rename(new)
        assert disk.run(new).updated == COUNT
        payloads = [payload for _, payload in disk.indexer.store.scan(["path", "paths"])]
        assert all(payload["path"] == payload["paths"][0] for payload in payloads)
        assert {Path(payload["path"]).parent for payload in payloads} == {new}
        assert {Path(payload["paths"][1]).parent for payload in payloads} == {disk.folder}
        summary = disk.run(new, disk.folder, prune=True)
        assert (summary.unchanged, summary.pruned, summary.failed) == (COUNT, COUNT, [])
        assert {Path(path).parent for path in disk.paths} == {new}

    def test_one_run_moves_a_folder_also_if_the_store_is_slow(
        self, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace = disk.indexer.store.replace_payloads

        def replace_slowly(*changes: Any) -> None:
            time.sleep(0.2)
            replace(*changes)

        disk.folder.rename(tmp_path / "new")
        monkeypatch.setattr(disk.indexer.store, "replace_payloads", replace_slowly)
        summary = disk.run(tmp_path / "new", disk.folder, prune=True)
        assert (summary.updated, summary.pruned, summary.failed) == (COUNT, COUNT, [])
        assert {Path(path).parent for path in disk.paths} == {tmp_path / "new"}

    def test_the_hits_of_a_moved_folder_name_files_that_exist_before_it_is_indexed_again(
        self, disk: Disk, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(disk.folder, copy)
        disk.run(copy)
        assert {Path(hit.path).parent for hit in disk.indexer.search("red", limit=100)} == {disk.folder}
        shutil.rmtree(disk.folder)
        assert {Path(hit.path).parent for hit in disk.indexer.search("red", limit=100)} == {copy}

    def test_a_vanished_copy_stays_until_it_is_pruned_and_is_counted_then(self, disk: Disk) -> None:
        shutil.copy(disk.folder / "5.bmp", disk.folder / "a.bmp")
        assert disk.run().updated == 1
        (disk.folder / "5.bmp").unlink()
        summary = disk.run()
        assert (summary.unchanged, summary.updated, summary.pruned) == (COUNT, 0, 0)
        found = [payload for _, payload in disk.indexer.store.scan(["path", "paths"]) if len(payload["paths"]) == 2]
        assert [Path(found[0]["path"]).name, *(Path(path).name for path in found[0]["paths"])] == ["a.bmp"] * 2 + [
            "5.bmp"
        ]
        assert disk.run(prune=True).pruned == 1
        assert len(disk.paths) == COUNT


class TestForget:
    def test_files_folders_shards_and_addresses_are_forgotten_and_copies_elsewhere_stay(
        self, disk: Disk, tmp_path: Path
    ) -> None:
        store = disk.indexer.store
        shutil.copytree(disk.folder, tmp_path / "copy")
        disk.run(tmp_path / "copy")
        ids = [id_ for id_, _ in store.scan([])]
        for id_, path in zip(
            ids, ("/a.tar#1.jpg", "/a.tar#2.jpg", "s3://bucket/x/1.jpg", "https://h/1.jpg"), strict=False
        ):
            stored = store.retrieve([id_])[id_]
            new: dict[str, Any] = {
                key: [*stored[key], value] for key, value in (("paths", path), ("relative_paths", "x"), ("mtimes", 0))
            }
            new |= {"shard": "/a.tar"} if path.startswith("/a.tar#") else {}
            store.replace_payloads([(id_, stored, {**stored, **new})])
        paths = [tmp_path / "copy", disk.folder / "1.bmp", "/a.tar", "s3://bucket/x", "https://h/1.jpg", "/a.ta"]
        forgotten = disk.indexer.forget(paths)
        assert [*forgotten.images.values()] == [COUNT, 1, 2, 1, 1, 0]
        assert (forgotten.deleted, store.count()) == (1, COUNT - 1)
        assert disk.paths == {str(path) for path in disk.folder.glob("*") if path.name != "1.bmp"}
        assert disk.indexer.forget(disk.folder).deleted == COUNT - 1
        assert disk.run().indexed == COUNT

    def test_a_file_next_to_a_folder_stays_and_each_name_has_its_own_count(self, disk: Disk, tmp_path: Path) -> None:
        trip = tmp_path / "trip"
        disk.paint(trip, 2, first=100)
        shutil.copy(trip / "100.bmp", tmp_path / "trip#2.bmp")
        disk.run(tmp_path)
        forgotten = disk.indexer.forget([trip / "101.bmp", f"{trip}/", f"file://{trip}"])
        assert forgotten == ({str(trip / "101.bmp"): 1, f"{trip}/": 2, f"file://{trip}": 2}, 1)
        assert str(tmp_path / "trip#2.bmp") in disk.paths

    def test_a_forgotten_image_of_an_archive_is_back_after_a_run(self, disk: Disk, tmp_path: Path) -> None:
        archive = tmp_path / os.fsdecode(b"caf\xe9.tar")
        archive.write_bytes(tar([("x.png", png(1)), ("copy.png", png(1)), ("y.png", png(2))]))
        assert disk.run(archive).indexed == 2
        shards = {payload.get("shard") for _, payload in disk.indexer.store.scan(["shard"])}
        assert shards == {None, storable(str(archive))}
        assert disk.indexer.forget(f"{archive}#copy.png") == ({f"{archive}#copy.png": 1}, 0)
        assert (disk.run(archive).updated, len(disk.paths)) == (1, COUNT + 3)
        assert disk.indexer.forget(archive).deleted == 2
        assert (disk.run(archive).indexed, len(disk.paths)) == (2, COUNT + 3)

    @pytest.mark.parametrize("is_on_disk", [True, False])
    @pytest.mark.parametrize(("stored", "given"), [("NFD", "NFC"), ("NFC", "NFD")])
    def test_a_name_matches_however_its_accents_are_composed_if_one_image_fits(
        self, disk: Disk, tmp_path: Path, stored: Form, given: Form, is_on_disk: bool
    ) -> None:
        def painted(form: Form, first: int) -> Path:
            disk.paint(folder := tmp_path / normalize(form, "\u00e9t\u00e9"), 2, first)
            disk.run(folder)
            return folder

        first, typed = painted(stored, 100), tmp_path / normalize(given, "\u00e9t\u00e9")
        if not is_on_disk:
            shutil.rmtree(first)
        assert disk.indexer.forget(typed / "100.bmp").images == {str(typed / "100.bmp"): 1}
        painted(given, 110)
        assert disk.indexer.forget([typed, typed / "101.bmp"]).images == {str(typed): 2, str(typed / "101.bmp"): 1}
        assert str(first / "101.bmp") not in disk.paths

    def test_a_missing_collection_is_an_error(self, disk: Disk) -> None:
        with pytest.raises(CocoaError, match="no collection 'other'"):
            QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"), collection="other").forget("x")
