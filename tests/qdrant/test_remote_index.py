"""A bucket is indexed as a folder is: unchanged files are skipped, deleted ones pruned, captions kept."""

from pathlib import Path

import fsspec
import pytest
from fake_model import FakeModel
from qdrant_client import QdrantClient
from source_files import parquet_file, tar
from table_files import png

from cocoa_embed.images.http import Fetcher
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.sources.base import SourceOptions


@pytest.fixture
def indexer() -> QdrantIndexer:
    return QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"))


def test_a_bucket_is_kept_up_to_date(indexer: QdrantIndexer) -> None:
    system = fsspec.filesystem("memory")
    for number in range(6):
        system.pipe(f"/album/sub/{number}.png", png(number))
    system.pipe("/album/metadata.csv", b"file_name,text\nsub/1.png,one\n")
    first = indexer.index("memory://album", progress=False)
    assert (first.indexed, first.failed) == (6, [])
    system.pipe("/album/sub/2.png", png(99))
    system.rm("/album/sub/3.png")
    system.pipe("/album/metadata.csv", b"file_name,text\nsub/1.png,uno\n")
    model = FakeModel()
    indexer._encoder = None
    indexer._model = model
    again = indexer.index("memory://album", prune=True, progress=False)
    assert (again.unchanged, again.updated, again.replaced, again.pruned) == (3, 1, 1, 1)
    assert len(model.documents) == 1
    points = indexer.store.scan(["path", "caption"])
    captions = {payload["path"].rpartition("/")[2]: payload["caption"] for _, payload in points}
    assert captions == {"0.png": None, "1.png": "uno", "2.png": None, "4.png": None, "5.png": None}
    system.rm("/album", recursive=True)


def test_unchanged_shards_are_not_opened_and_images_that_changed_ones_lost_are_pruned(
    indexer: QdrantIndexer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar").write_bytes(tar([(f"{n}.png", png(n)) for n in range(4)]))
    (tmp_path / "b.parquet").write_bytes(parquet_file([{"image": png(n)} for n in range(10, 13)]))
    assert indexer.index(tmp_path, progress=False).indexed == 7
    with monkeypatch.context() as patch:
        patch.setattr("cocoa_embed.sources.shard_files.ShardFile.records", None)
        assert indexer.index(tmp_path, progress=False).unchanged == 7
    (tmp_path / "a.tar").write_bytes(tar([(f"{n}.png", png(n)) for n in (0, 1, 7)]))
    changed = indexer.index(tmp_path, prune=True, progress=False)
    assert (changed.indexed, changed.unchanged, changed.pruned) == (1, 5, 2)
    assert indexer.store.count() == 6


def test_addresses_are_fetched_once(indexer: QdrantIndexer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(self: Fetcher, address: str) -> bytes:
        fetched.append(address)
        return png(int(address[-1]))

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    (tmp_path / "list.txt").write_text("https://photos.test/1\nhttps://photos.test/2\n")
    options = SourceOptions(allowed_hosts=("photos.test",))
    assert indexer.index(tmp_path / "list.txt", sources=options, progress=False).indexed == 2
    (tmp_path / "list.txt").write_text("https://photos.test/1\nhttps://photos.test/2\nhttps://photos.test/3\n")
    again = indexer.index(tmp_path / "list.txt", sources=options, progress=False)
    assert (again.indexed, again.unchanged) == (1, 2)
    assert sorted(fetched) == [f"https://photos.test/{n}" for n in (1, 2, 3)]
