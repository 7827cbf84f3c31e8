"""Indexers that write to one server at the same time lose nothing of each other's."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_model import FakeModel
from fake_qdrant import FakeServer, Handler
from PIL import Image

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.integrations.qdrant.indexing import merge, writer

COUNT = 12
INSERT, MERGE = "PUT /collections/images/points", "POST /collections/images/points/batch"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same images."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    for number in range(COUNT):
        Image.new("RGB", (8, 8), (number, 100, 200 - number)).save(one / f"{number}.bmp")
    shutil.copytree(one, other)
    return one, other


@pytest.fixture
def indexers(server: FakeServer) -> Iterator[list[QdrantIndexer]]:
    indexers = [QdrantIndexer(FakeModel(), url=server.url) for _ in range(2)]
    yield indexers
    for indexer in indexers:
        indexer.close()


def paths(server: FakeServer) -> list[set[str]]:
    points, _ = server.client.scroll("images", limit=1000)
    return [set((point.payload or {})["paths"]) for point in points]


def meanwhile(act: Callable[[], object]) -> Callable[[Handler], bool]:
    """A fault that lets a request pass after something else has happened."""

    def fault(handler: Handler) -> bool:
        act()
        return False

    return fault


def assert_each_content_has_both_files(server: FakeServer, folders: tuple[Path, Path]) -> None:
    expected = [{str(folder / f"{number}.bmp") for folder in folders} for number in range(COUNT)]
    assert sorted(map(sorted, paths(server))) == sorted(map(sorted, expected))


@pytest.mark.parametrize("moment", [INSERT, "POST /collections/images/points"])
def test_copies_that_another_process_indexes_at_the_same_time_keep_both_paths(
    server: FakeServer, indexers: list[QdrantIndexer], folders: tuple[Path, Path], moment: str
) -> None:
    one, other = indexers
    indexers[0].index(folders[0] / "0.bmp", progress=False)
    server.fail(moment, meanwhile(lambda: other.index(folders[1], progress=False)))
    one.index(folders[0], progress=False)
    assert not server.faults
    assert_each_content_has_both_files(server, folders)


def test_a_merge_that_another_process_has_overtaken_is_repeated(
    server: FakeServer, indexers: list[QdrantIndexer], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    one, other = indexers
    shutil.copytree(folders[0], tmp_path / "third")
    one.index(tmp_path / "third", progress=False)
    server.fail(MERGE, meanwhile(lambda: other.index(folders[1], progress=False)))
    one.index(folders[0], progress=False)
    merges = [request for request in server.requests if request.path.endswith("/batch")]
    assert len(merges) == 3, "one's was overtaken by the other's, and made again"
    assert {len(each) for each in paths(server)} == {3}


def test_many_merges_at_once_lose_nothing(
    server: FakeServer, indexers: list[QdrantIndexer], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BATCH_CHANGES", 2)
    monkeypatch.setattr(writer, "BATCH_POINTS", 2)
    for folder in folders:
        for number in range(COUNT):
            shutil.copy(folder / f"{number}.bmp", folder / f"again{number}.bmp")
    indexers[0].index(folders[0] / "0.bmp", progress=False)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(indexer.index, folder, progress=False)
            for indexer, folder in zip(indexers, folders, strict=True)
        ]
        assert [run.result().failed for run in runs] == [[], []]
    assert {len(each) for each in paths(server)} == {4}
    assert len(paths(server)) == COUNT


def test_a_point_that_is_pruned_while_another_process_adds_a_file_is_kept(
    server: FakeServer, indexers: list[QdrantIndexer], folders: tuple[Path, Path]
) -> None:
    one, other = indexers
    one.index(folders[0], progress=False)
    (folders[0] / "0.bmp").unlink()
    server.fail(MERGE, meanwhile(lambda: other.index(folders[1], progress=False)))
    assert one.index(folders[0], prune=True, progress=False).pruned == 1
    assert len(paths(server)) == COUNT
    assert {str(folders[1] / "0.bmp")} in paths(server)


def test_a_file_whose_point_another_process_deletes_meanwhile_is_reported_and_indexed_by_the_next_run(
    server: FakeServer, indexers: list[QdrantIndexer], folders: tuple[Path, Path]
) -> None:
    one, other = indexers
    other.index(folders[1], progress=False)
    server.fail(MERGE, meanwhile(lambda: other.forget(folders[1])))
    (failure, *_) = one.index(folders[0], progress=False).failed
    assert failure["reason"] == "another process removed its point at the same time; run again"
    assert one.index(folders[0], progress=False).indexed == COUNT
    assert len(paths(server)) == COUNT


def test_merging_gives_up_if_other_writers_never_stop(
    server: FakeServer, indexers: list[QdrantIndexer], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "ATTEMPTS", 3)
    one, other = indexers
    other.index(folders[1], progress=False)

    def touch() -> None:
        points = dict(other.store.scan(None))
        other.store.replace_payloads([(id_, payload, payload) for id_, payload in points.items()])

    server.fail(MERGE, *[meanwhile(touch), lambda _: False] * 3)
    with pytest.raises(CocoaError, match="other processes keep changing 12 points; run again"):
        one.index(folders[0], progress=False)
