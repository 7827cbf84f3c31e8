"""The local store and Qdrant Edge: their folders, and what can break them."""

import errno
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import qdrant_edge
from fake_qdrant import OTHER, SIGNATURE, delete, make_points, make_vector, name
from other_processes import BATCH, fill, run_and_kill
from qdrant_client import QdrantClient

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.stores import base, edge, local, open_store
from cocoa_embed.integrations.qdrant.stores.base import PAYLOAD_INDEXES, Point, Query, Signature
from cocoa_embed.integrations.qdrant.stores.store import Store

pytestmark = pytest.mark.usefixtures("few_payload_indexes")

Opener = Callable[..., Store]


@pytest.fixture(params=["path", "edge"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


class TestBoth:
    def test_a_second_user_is_refused_at_once_whether_ours_or_plain(
        self, backend: str, store: Store, opener: Opener, folder: Path
    ) -> None:
        store.insert(make_points(0, 3))
        with pytest.raises(CocoaError, match=r"store is in use by .* in this one; .*, or run a Qdrant"):
            opener().insert(make_points(3, 4))
        store.close()
        is_edge = backend == "edge"
        plain: Any = qdrant_edge.EdgeShard.load(str(folder / "images")) if is_edge else QdrantClient(path=str(folder))
        with pytest.raises(CocoaError, match="in use by another process"):
            store.count()
        plain.close()
        assert store.count() == 3

    @pytest.mark.parametrize(
        "left", [[".cocoa-lock"], [".cocoa-lock", "meta.json.7.new"], ["meta.json", ".lock"], [".cocoa-edge"]]
    )
    def test_a_store_whose_creation_was_killed_is_created_again(self, left: list[str], tmp_path: Path) -> None:
        for file in left:
            (tmp_path / file).touch()
        store = open_store(**{"edge" if left == [".cocoa-edge"] else "path": tmp_path}, collection="images")
        assert store.signature() is None
        store.create(SIGNATURE)
        store.close()
        assert store.count() == 0
        store.close()

    def test_a_folder_that_cannot_be_written_is_named(
        self, backend: str, opener: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
        monkeypatch.setattr({"path": local, "edge": edge}[backend], "write_atomically", broken)
        with pytest.raises(CocoaError, match=r"store cannot be (opened|used) \(.*Read-only file system"):
            opener().create(SIGNATURE)

    @pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_a_killed_store_has_everything_that_it_confirmed(
        self, backend: str, seed: int, opener: Opener, folder: Path
    ) -> None:
        moments = random.Random(seed)
        stored = 0
        for seconds in (0.0, moments.random() * 0.1, moments.random() * 0.5, 1.0, 8.0):
            if seconds >= 1 and stored:
                break  # only a busy machine has stored nothing yet
            _, reports = run_and_kill(seconds, fill, {backend: str(folder)}, stored, BATCH, 3000)
            store = opener()
            if store.signature() is not None:
                assert store.signature() == SIGNATURE
                assert reports[-1] <= store.count() <= reports[-1] + BATCH
                stored = store.count()
                assert sorted(payload["number"] for _, payload in store.scan(["number"])) == list(range(stored))
                for number in range(max(0, stored - 10), stored):
                    assert store.search(Query(make_vector(number), limit=1))[0].id == name(number)
            store.close()
        assert stored > 0

    def test_an_unclosed_store_keeps_its_points_and_prints_nothing(
        self, backend: str, opener: Opener, folder: Path
    ) -> None:
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2] / 'support')!r})\n"
            "from cocoa_embed.integrations.qdrant.stores import open_store\n"
            "from fake_qdrant import SIGNATURE, make_points\n"
            f"store = open_store({backend}={str(folder)!r}, collection='images')\n"
            "store.create(SIGNATURE); store.insert(make_points(0, 7)); print(store.count())"
        )
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        assert (done.stdout.split(), done.stderr) == (["7"], "")
        assert opener().count() == 7


@pytest.mark.parametrize("backend", ["path"], indirect=True)
class TestLocal:
    @pytest.mark.parametrize(
        ("file", "content"),
        [("collection/images/storage.sqlite", "x" * 5000), *[("meta.json", text) for text in ("", "{", "[]", "{}")]],
    )
    def test_a_store_with_a_damaged_file_is_named_and_not_created_again(
        self, store: Store, folder: Path, file: str, content: str
    ) -> None:
        store.close()
        (folder / file).write_text(content)
        for call in (store.signature, lambda: store.create(SIGNATURE)):
            with pytest.raises(CocoaError, match="store cannot be opened"):
                call()
        assert (folder / file).read_text() == content

    def test_changes_go_to_a_log_that_closing_removes(self, store: Any, folder: Path) -> None:  # noqa: ANN401
        files = folder / "collection" / "images"
        for start in (0, 50):
            store.insert(make_points(start, start + 50))
            connection = store._connected()._client.collections["images"].storage.storage
            assert connection.execute("PRAGMA synchronous").fetchone() == (1,), "a commit does not wait for the disk"
            assert (files / "storage.sqlite-wal").stat().st_size > 0
            store.close()
        assert [entry.name for entry in files.iterdir()] == ["storage.sqlite"]


@pytest.mark.parametrize("backend", ["edge"], indirect=True)
class TestEdge:
    def test_a_collection_has_the_payload_indexes(
        self, opener: Opener, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "PAYLOAD_INDEXES", PAYLOAD_INDEXES)
        store = opener()
        store.create(SIGNATURE)
        store.close()
        shard = qdrant_edge.EdgeShard.load(str(folder / "images"))
        schema = shard.info().payload_schema
        kinds = {field: str(index.data_type).rpartition(".")[2].lower() for field, index in schema.items()}
        assert kinds == PAYLOAD_INDEXES
        shard.close()

    def test_collections_can_be_open_at_once_and_only_one_process_creates(
        self, store: Store, opener: Opener, folder: Path
    ) -> None:
        other = opener(collection="2nd")
        other.create(OTHER)
        store.insert(make_points(0, 3))
        assert (store.count(), other.count()) == (3, 0)
        with edge.folder_lock(folder / ".cocoa-edge"), pytest.raises(CocoaError, match="in use by another process"):
            opener(collection="3rd").create(SIGNATURE)
        assert opener(collection="3rd").signature() is None

    def test_a_broken_file_is_named(self, store: Store, folder: Path) -> None:
        store.close()
        for segment in list((folder / "images" / "segments").rglob("*.json")):
            segment.write_text("{")
        with pytest.raises(CocoaError, match="store failed: "):
            store.count()
        for file, text in (("signature.json", "{"), ("edge_config.json", "5")):
            (folder / "images" / file).write_text(text)
            with pytest.raises(CocoaError, match=rf"{file} does not hold a JSON object; .*cannot be opened"):
                store.signature()

    def test_a_kill_at_any_step_of_a_creation_leaves_no_collection(
        self, opener: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def kill(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        store = opener()
        steps = [(edge, name) for name in ("shard_config", "flush_and_close", "write_atomically")]
        for owner, step in (*steps, (edge.os, "replace")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, step, kill)
                with pytest.raises(KeyboardInterrupt):
                    store.create(SIGNATURE)
            assert store.signature() is None
        store.create(SIGNATURE)
        store.insert(make_points(0, 3))
        assert store.count() == 3

    def test_scores_are_exact_before_and_after_the_index_is_built(
        self, opener: Opener, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # So few points would not be indexed at all.
        optimizers = qdrant_edge.EdgeOptimizersConfig(indexing_threshold=100)
        config = qdrant_edge.EdgeConfig
        monkeypatch.setattr(edge.edge, "EdgeConfig", lambda **options: config(**options, optimizers=optimizers))
        store = opener(quantization="binary", memory="cold")
        store.create(Signature("m", "0f", 128))
        rng = np.random.default_rng(0)
        centers = rng.normal(size=(40, 128))
        vectors = (centers[np.arange(1000) % 40] + 0.5 * rng.normal(size=(1000, 128))).astype(np.float32)
        store.insert([Point(name(number), vector, {"n": number}) for number, vector in enumerate(vectors)])
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        stored = json.loads((folder / "images" / "edge_config.json").read_text())["vectors"][""]
        assert (stored["quantization_config"].keys(), stored["memory"]) == ({"binary"}, "cold")
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
        assert store._opened.info().indexed_vectors_count == 1000

    def test_nothing_is_written_created_or_opened_without_enough_disk_space(
        self, store: Store, opener: Opener, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.insert(make_points(0, 5))

        def leave_free(mebibytes: int) -> None:
            monkeypatch.setattr(edge.shutil, "disk_usage", lambda _: Mock(free=mebibytes * 2**20))

        leave_free(100)
        other = opener(collection="others")
        changes = (lambda: store.insert(make_points(5, 10)), lambda: delete(store, name(1)), store.finish)
        for change in (*changes, lambda: other.create(SIGNATURE)):
            with pytest.raises(CocoaError, match=r"store is full: 100 MiB are free, .* needs 1\d\d MiB; .* is safe"):
                change()
        assert (store.count(), other.signature()) == (5, None)
        store.close()
        leave_free(10)
        with pytest.raises(CocoaError, match="is full: 10 MiB are free, but Qdrant Edge needs 32 MiB"):
            store.count()
        monkeypatch.undo()
        assert store.count() == 5
