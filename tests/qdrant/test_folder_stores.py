"""The local store and Qdrant Edge: their files, and what can break them."""

import json
import sqlite3
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge
from fake_qdrant import DIMENSION, OTHER, SIGNATURE, make_points, name

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.stores import base, edge, open_store
from cocoa_embed.integrations.qdrant.stores.base import (
    PAYLOAD_INDEXES,
    Point,
    Query,
    Signature,
    StoreOptions,
)
from cocoa_embed.integrations.qdrant.stores.store import Store

pytestmark = pytest.mark.usefixtures("few_payload_indexes")

MEBIBYTE = 2**20
Usage = namedtuple("Usage", "total used free")


class TestLocal:
    @pytest.mark.parametrize("meta", ["{", "[]", "{}", '{"collections": null}', '{"collections": {"a": {}}}'])
    def test_a_broken_store_is_named_and_not_changed(self, tmp_path: Path, meta: str) -> None:
        (tmp_path / "meta.json").write_text(meta)
        store = open_store(path=tmp_path, collection="images")
        for call in (store.signature, lambda: store.create(SIGNATURE)):
            with pytest.raises(CocoaError, match="cannot be opened"):
                call()
        assert (tmp_path / "meta.json").read_text() == meta

    @pytest.mark.parametrize(
        ("file", "content", "words"),
        [("collection/images/storage.sqlite", b"x" * 5000, r"\(file is not a database\)"), ("meta.json", b"", "")],
    )
    def test_a_store_with_a_damaged_file_is_not_created_anew(
        self, tmp_path: Path, file: str, content: bytes, words: str
    ) -> None:
        store = open_store(path=tmp_path, collection="images")
        store.create(SIGNATURE)
        store.close()
        (tmp_path / file).write_bytes(content)
        with pytest.raises(CocoaError, match="cannot be opened .*" + words):
            store.signature()
        store.close()

    def test_changes_go_to_a_log_that_closing_removes(self, tmp_path: Path) -> None:
        store: Any = open_store(path=tmp_path, collection="images")
        store.create(SIGNATURE)
        folder = tmp_path / "collection" / "images"
        for start in (0, 50):
            store.upsert(make_points(start, start + 50))
            connection = store._connected()._client.collections["images"].storage.storage
            assert connection.execute("PRAGMA synchronous").fetchone() == (1,), "a commit does not wait for the disk"
            assert (folder / "storage.sqlite-wal").stat().st_size > 0
            store.close()
        assert [entry.name for entry in folder.iterdir()] == ["storage.sqlite"]
        with sqlite3.connect(folder / "storage.sqlite") as connection:
            assert connection.execute("SELECT count(*) FROM points").fetchone() == (100,)
        connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def store(folder: Path, few_payload_indexes: None) -> Iterator[Store]:
    store = open_store(edge=folder, collection="images")
    store.create(SIGNATURE)
    yield store
    store.close()


class TestEdge:
    def test_a_collection_is_a_folder_with_a_shard_and_a_signature(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "PAYLOAD_INDEXES", PAYLOAD_INDEXES)
        store = open_store(edge=folder, collection="images")
        store.create(SIGNATURE)
        signature = json.loads((folder / "images" / "signature.json").read_text())
        assert signature == {"model": "m", "fingerprint": "0f", "dimension": DIMENSION}
        store.close()
        shard = qdrant_edge.EdgeShard.load(str(folder / "images"))
        schema = shard.info().payload_schema
        kinds = {field: str(index.data_type).rpartition(".")[2].lower() for field, index in schema.items()}
        assert kinds == PAYLOAD_INDEXES
        shard.close()
        assert sorted(entry.name for entry in folder.iterdir()) == [".cocoa-edge", "images"]
        (folder / "photos").mkdir()
        (folder / "photos" / "a.png").touch()
        with pytest.raises(CocoaError, match="photos holds something else"):
            open_store(edge=folder, collection="photos").create(SIGNATURE)
        with pytest.raises(CocoaError, match="holds something else"):
            open_store(path=folder, collection="images").signature()

    def test_collections_can_be_open_at_once_and_only_one_process_creates(self, store: Store, folder: Path) -> None:
        other = open_store(edge=folder, collection="2nd")
        other.create(OTHER)
        store.upsert(make_points(0, 3))
        other.upsert(make_points(0, 1))
        assert (store.count(), other.count()) == (3, 1)
        other.close()
        lock = edge.folder_lock(folder / ".cocoa-edge").acquire().lock
        third = open_store(edge=folder, collection="3rd")
        with pytest.raises(CocoaError, match="in use by another process"):
            third.create(SIGNATURE)
        assert third.signature() is None
        lock.release()
        third.create(SIGNATURE)

    def test_a_shard_without_a_signature_has_an_unknown_model_until_it_is_signed(
        self, store: Store, folder: Path
    ) -> None:
        store.upsert(make_points(0, 3))
        (folder / "images" / "signature.json").unlink()
        assert store.signature() == Signature(model="an unknown model", fingerprint=None, dimension=DIMENSION)
        store.create(SIGNATURE)
        assert (store.signature(), store.count()) == (SIGNATURE, 3)

    def test_a_broken_file_is_named(self, store: Store, folder: Path) -> None:
        store.close()
        for segment in list((folder / "images" / "segments").rglob("*.json")):
            segment.write_text("{")
        with pytest.raises(CocoaError, match="shards failed: "):
            store.count()
        for file in ("signature.json", "edge_config.json"):
            for text in ("", "{", "[]", "5"):
                (folder / "images" / file).write_text(text)
                with pytest.raises(CocoaError, match=rf"{file} holds no JSON object; .*cannot be opened"):
                    store.signature()

    def test_a_kill_at_any_step_of_a_creation_leaves_no_collection(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Kill(BaseException):
            pass

        def kill(*_: object, **__: object) -> None:
            raise Kill

        steps = [(edge, name) for name in ("shard_config", "flush_and_close", "write_atomically")]
        for owner, step in (*steps, (edge.os, "replace")):
            store = open_store(edge=folder, collection="images")
            with monkeypatch.context() as patch:
                patch.setattr(owner, step, kill)
                with pytest.raises(Kill):
                    store.create(SIGNATURE)
            assert (store.signature(), store.collections()) == (None, [])
        store.create(SIGNATURE)
        store.upsert(make_points(0, 3))
        assert store.count() == 3
        store.close()

    @pytest.mark.parametrize(("quantization", "on_disk"), [(None, False), ("scalar", True), ("binary", True)])
    def test_scores_are_exact_before_and_after_the_index_is_built(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, quantization: str | None, on_disk: bool
    ) -> None:
        # So few points would not be indexed at all.
        optimizers = qdrant_edge.EdgeOptimizersConfig(indexing_threshold=100)
        config = qdrant_edge.EdgeConfig
        monkeypatch.setattr(edge.edge, "EdgeConfig", lambda **options: config(**options, optimizers=optimizers))
        options = StoreOptions(quantization=quantization, on_disk=on_disk)  # type: ignore[arg-type]
        store = open_store(edge=folder, collection="images", options=options)
        store.create(Signature(model="m", fingerprint="0f", dimension=128))
        rng = np.random.default_rng(0)
        centers = rng.normal(size=(40, 128))
        vectors = (centers[np.arange(1000) % 40] + 0.5 * rng.normal(size=(1000, 128))).astype(np.float32)
        store.upsert([Point(name(number), vector, {"n": number}) for number, vector in enumerate(vectors)])
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        stored = json.loads((folder / "images" / "edge_config.json").read_text())["vectors"][""]
        assert stored.get("quantization_config", {}).keys() == ({quantization} - {None})
        assert stored.get("memory") == ("cold" if on_disk else None)
        for _ in range(2):
            for number in range(0, 1000, 97):
                found = store.search(Query(vectors[number], limit=10))
                cosines = unit @ unit[number]
                assert [hit.score for hit in found] == pytest.approx(np.sort(cosines)[::-1][:10], abs=2e-3)
                exact = [cosines[hit.payload["n"]] for hit in found]
                assert [hit.score for hit in found] == pytest.approx(exact, abs=1e-5)
                assert found[0].id == name(number)
            store.finish()
            assert len(list((folder / "images" / "segments").iterdir())) <= 2, "old segments are deleted"
        store.close()
        shard = qdrant_edge.EdgeShard.load(str(folder / "images"))
        assert shard.info().indexed_vectors_count == 1000
        shard.close()

    def test_a_failed_write_is_reported_and_the_next_one_reloads_the_shard(self, store: Store) -> None:
        store.upsert(make_points(0, 5))
        with pytest.raises(CocoaError, match=rf"Qdrant Edge at .*shards failed: No point with id {name(7)}"):
            store.overwrite_payload(name(7), {})
        store.upsert(make_points(5, 7))
        assert store.count() == 7

    def test_nothing_is_written_created_or_opened_without_enough_disk_space(
        self, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.upsert(make_points(0, 5))

        def leave_free(mebibytes: int) -> None:
            usage = Usage(2**40, 2**40 - mebibytes * MEBIBYTE, mebibytes * MEBIBYTE)
            monkeypatch.setattr(edge.shutil, "disk_usage", lambda _: usage)

        leave_free(100)
        for call in (lambda: store.upsert(make_points(5, 10)), lambda: store.delete([name(1)]), store.finish):
            with pytest.raises(CocoaError, match=r"shards is full: 100 MiB are free, .* needs 1\d\d MiB; .* is safe"):
                call()
        assert store.count() == 5
        store.close()
        leave_free(10)
        assert store.signature() == SIGNATURE
        with pytest.raises(CocoaError, match="is full: 10 MiB are free, Qdrant Edge needs 32 MiB"):
            store.count()
        with pytest.raises(CocoaError, match="is full: 10 MiB are free, Qdrant Edge needs 128 MiB"):
            open_store(edge=folder, collection="others").create(SIGNATURE)
        assert sorted(entry.name for entry in folder.iterdir()) == [".cocoa-edge", "images"]
        monkeypatch.undo()
        store.upsert(make_points(5, 10))
        assert store.count() == 10
