"""What a run finds out is known to the next, and a manifest that cannot be used is no fault."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from fake_model import FakeModel, write_colours

from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.integrations.qdrant.indexing.manifest import CompleteShard, Fault, Manifest, manifest_file

SHARD = CompleteShard("1", 5, "4 0f", True)


def test_the_manifest_of_a_collection_is_kept_and_an_unwritable_folder_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COCOA_CACHE", str(tmp_path / "cache"))
    assert manifest_file("a") == manifest_file("a") != manifest_file("b")
    assert manifest_file(os.fsdecode(b"caf\xe9")) != manifest_file("caf\u00e9")
    with closing(Manifest(manifest_file("a"))) as manifest:
        manifest.complete("/data/one.tar", SHARD)
    assert Manifest(manifest_file("a")).shard("/data/one.tar") == SHARD
    assert Manifest(manifest_file("b")).shard("/data/one.tar") is None
    (tmp_path / "file").touch()
    for unusable in (tmp_path / "file" / "x", tmp_path / "broken"):
        if unusable.name == "broken":
            unusable.write_bytes(b"SQLite format 3\0" + b"no database" * 100)
        assert Manifest(unusable).shard("/data/one.tar") is None


def test_the_manifest_of_a_collection_in_memory_is_in_memory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COCOA_CACHE", str(tmp_path / "cache"))
    write_colours(tmp_path / "photos", "red")
    assert QdrantIndexer(FakeModel(), path=":memory:").index(tmp_path / "photos", progress=False).indexed == 1
    assert not (tmp_path / "cache" / "collections").exists()


def test_a_manifest_of_an_earlier_version_is_used_and_its_shards_are_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(tmp_path / "manifest", isolation_level=None)) as database:
        database.execute("CREATE TABLE shards (key TEXT PRIMARY KEY, version TEXT, records INTEGER, points INTEGER)")
        database.execute("INSERT INTO shards VALUES ('/data/one.tar', '1', 5, 4)")
    with closing(Manifest(tmp_path / "manifest")) as manifest:
        assert manifest.shard("/data/one.tar") is None
        manifest.complete("/data/one.tar", SHARD)
        assert manifest.shard("/data/one.tar") == SHARD
    assert not caplog.messages


def test_a_fault_that_stays_in_its_shard_is_not_written_again(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest")
    for shard in (None, "/data/one.tar"):
        manifest.add_fault(Fault("a", "is broken"), shard, "1", "00")
        written = manifest._database.total_changes
        manifest.keep_fault("a", shard)
        assert manifest._database.total_changes == written
    manifest.keep_fault("a", "/data/other.tar")
    assert manifest.faults_in("/data/other.tar") == [Fault("a", "is broken")]
