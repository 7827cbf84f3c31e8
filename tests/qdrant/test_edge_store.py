"""The store of Qdrant Edge: its folders, what ends a process in the middle of a write, and what the engine is told."""

import errno
import json
import random
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

import qdrant_edge as edge
from store_kills import CREATE, check_after_kill, run_and_kill, run_process, set_disk, small_disk
from store_points import DIMENSION, SIGNATURE, make_points, make_vector, name

from cocoa_embed.errors import CocoaError, MissingExtraError, UsageError
from cocoa_embed.integrations.qdrant.filters import parse_filters
from cocoa_embed.integrations.qdrant.stores import edge as edge_store
from cocoa_embed.integrations.qdrant.stores.base import (
    PAYLOAD_INDEXES,
    UNKNOWN_MODEL,
    Point,
    Signature,
    StoreOptions,
    open_store,
)
from cocoa_embed.integrations.qdrant.stores.edge import EdgeStore

Quantization = Literal["scalar", "binary"] | None
MEBIBYTE = 2**20
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def store(folder: Path) -> Any:  # noqa: ANN401 - a generator of a store
    store = open_store(edge=folder, collection="images")
    store.create(SIGNATURE)
    yield store
    store.close()


def leave_free(monkeypatch: pytest.MonkeyPatch, bytes_free: int) -> None:
    monkeypatch.setattr(edge_store.shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - bytes_free, bytes_free))


class TestFolders:
    def test_a_collection_is_a_shard_with_a_signature_in_its_own_folder(self, store: EdgeStore, folder: Path) -> None:
        assert json.loads((folder / "images" / "signature.json").read_text()) == {
            "model": "m",
            "fingerprint": "0f",
            "dimension": DIMENSION,
        }
        store.close()
        shard = edge.EdgeShard.load(str(folder / "images"))
        kinds = {
            field: str(index.data_type).rpartition(".")[2].lower()
            for field, index in shard.info().payload_schema.items()
        }
        assert kinds == PAYLOAD_INDEXES
        shard.close()
        assert sorted(entry.name for entry in folder.iterdir()) == [".cocoa-edge", "images"]

    def test_reading_creates_nothing(self, tmp_path: Path) -> None:
        for place in (tmp_path / "none", tmp_path):
            store = open_store(edge=place, collection="images")
            assert store.signature() is None
            with pytest.raises(CocoaError, match="there is no collection 'images' in"):
                store.count()
        assert open_store(edge=tmp_path / "none", collection="images").collections() is None
        assert list(tmp_path.iterdir()) == []

    def test_collections_are_beside_each_other_and_can_be_open_at_once(self, store: EdgeStore, folder: Path) -> None:
        other = open_store(edge=folder, collection="2nd žluť")
        other.create(Signature(model="n", fingerprint="ff", dimension=3))
        store.upsert(make_points(0, 3))
        other.upsert([Point(name(1), np.ones(3, dtype=np.float32), {})])
        assert (store.count(), other.count()) == (3, 1)
        assert store.collections() == other.collections() == ["2nd žluť", "images"]
        other.close()

    def test_a_second_process_is_named_and_the_lock_ends_with_the_first(self, store: EdgeStore, folder: Path) -> None:
        store.upsert(make_points(0, 3))
        assert "in use by another process; wait for it" in run_process("edge", folder, "store.count()").stderr
        second = open_store(edge=folder, collection="images")
        assert second.signature() == SIGNATURE
        with pytest.raises(CocoaError, match="shards is in use by another process"):
            second.upsert(make_points(3, 4))
        store.close()
        assert second.count() == 3
        second.close()

    def test_a_plain_shard_of_another_program_in_the_same_folder_is_another_process_too(
        self, store: EdgeStore, folder: Path
    ) -> None:
        store.close()
        shard = edge.EdgeShard.load(str(folder / "images"))
        with pytest.raises(CocoaError, match="shards is in use by another process"):
            store.count()
        shard.close()
        assert store.count() == 0

    def test_a_shard_without_a_signature_is_of_an_unknown_model_until_it_is_signed(
        self, store: EdgeStore, folder: Path
    ) -> None:
        store.upsert(make_points(0, 3))
        store.close()
        (folder / "images" / "signature.json").unlink()
        assert store.signature() == Signature(model=UNKNOWN_MODEL, fingerprint=None, dimension=DIMENSION)
        store.create(SIGNATURE)
        assert store.signature() == SIGNATURE
        (folder / "images" / "signature.json").write_text('{"model": 5}')
        assert store.signature() == Signature(model=UNKNOWN_MODEL, fingerprint=None, dimension=DIMENSION)
        store.sign(SIGNATURE)
        assert store.signature() == SIGNATURE
        assert store.count() == 3

    @pytest.mark.parametrize("file", ["signature.json", "edge_config.json"])
    @pytest.mark.parametrize("text", ["", "{", "[]", "5"])
    def test_a_broken_file_is_named(self, store: EdgeStore, folder: Path, file: str, text: str) -> None:
        store.close()
        (folder / "images" / file).write_text(text)
        with pytest.raises(CocoaError, match=rf"{file} (is not JSON|holds no JSON object).*cannot be opened"):
            store.signature()

    def test_a_shard_that_lost_its_files_is_named(self, store: EdgeStore, folder: Path) -> None:
        store.close()
        for segment in (folder / "images" / "segments").iterdir():
            for file in segment.rglob("*.json"):
                file.write_text("{")
        with pytest.raises(CocoaError, match=r"Qdrant Edge at .*shards did not do what was asked: "):
            store.count()

    def test_other_vectors_than_ours_are_refused(self, folder: Path) -> None:
        vectors = edge.EdgeVectorParams(size=48, distance=edge.Distance.Dot)
        wanted: dict[str, tuple[Any, str]] = {
            "dots": (vectors, r"48 dimensions \(Dot\).*48 \(Cosine\)"),
            "named": ({"v": vectors, "w": vectors}, r"holds named vectors \((v, w|w, v)\)"),
        }
        for collection, (config, words) in wanted.items():
            (folder / collection).mkdir(parents=True)
            edge.EdgeShard.create(str(folder / collection), edge.EdgeConfig(vectors=config)).close()
            with pytest.raises(CocoaError, match=words):
                open_store(edge=folder, collection=collection).signature()

    def test_what_holds_something_else_is_refused_and_left_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "a.png").touch()
        for place, words in (("file", "file is a file"), ("photos", "holds something else")):
            store = open_store(edge=tmp_path / place, collection="images")
            for call in (store.signature, lambda store=store: store.create(SIGNATURE)):
                with pytest.raises(CocoaError, match=words):
                    call()
        assert [entry.name for entry in (tmp_path / "photos").iterdir()] == ["a.png"]
        shards = tmp_path / "shards"
        open_store(edge=shards, collection="others").create(SIGNATURE)
        (shards / "images").mkdir()
        (shards / "images" / "a.png").touch()
        with pytest.raises(CocoaError, match="images holds something else"):
            open_store(edge=shards, collection="images").create(SIGNATURE)
        with pytest.raises(CocoaError, match="holds something else"):
            open_store(path=shards, collection="images").signature()

    @pytest.mark.parametrize("left", [".cocoa-edge", "creating:", "creating:/segments", "images"])
    def test_the_beginnings_of_a_shard_are_gone_on_with(self, folder: Path, left: str) -> None:
        folder.mkdir()
        (folder / ".cocoa-edge").touch()
        if left != ".cocoa-edge":
            (folder / left).mkdir(parents=True)
        store = open_store(edge=folder, collection="images")
        assert store.signature() is None
        assert store.collections() == []
        store.create(SIGNATURE)
        store.upsert(make_points(0, 3))
        assert store.count() == 3
        assert not (folder / "creating:").exists()
        store.close()

    def test_two_processes_that_create_a_shard_at_once_do_not_spoil_it(self, store: EdgeStore, folder: Path) -> None:
        store.close()
        with edge_store.lock_file(folder / ".cocoa-edge", "here"):
            with pytest.raises(CocoaError, match="in use by another process"):
                open_store(edge=folder, collection="others").create(SIGNATURE)
            assert open_store(edge=folder, collection="others").signature() is None
        second = open_store(edge=folder, collection="images")
        second.create(SIGNATURE)
        with pytest.raises(CocoaError, match="was made with m, not with n"):
            second.create(Signature(model="n", fingerprint="ff", dimension=DIMENSION))

    def test_a_missing_extra_is_named(self) -> None:
        code = (
            "import sys; sys.modules['qdrant_edge'] = None\n"
            "from cocoa_embed.integrations.qdrant.stores.base import open_store\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code + "open_store(edge='x', collection='c')"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "qdrant_edge is not installed; run: pip install 'cocoa-embed[edge]'" in run.stderr
        assert MissingExtraError.__name__ in run.stderr


class TestEngine:
    def test_the_engine_takes_vectors_that_are_refused_before_they_reach_it(
        self, store: EdgeStore, folder: Path
    ) -> None:
        store.close()
        shard = edge.EdgeShard.load(str(folder / "images"))
        shard.update(edge.UpdateOperation.upsert_points([edge.Point(3, [float("nan")] * DIMENSION, {})]))
        assert shard.count(edge.CountRequest()) == 1
        shard.close()
        with pytest.raises(CocoaError, match="not finite"):
            store.upsert([Point(name(1), np.full(DIMENSION, np.nan, dtype=np.float32), {})])
        assert store.count() == 1

    def test_points_with_integer_ids_are_listed_and_left(self, store: EdgeStore, folder: Path) -> None:
        store.upsert(make_points(1, 2))
        store.close()
        shard = edge.EdgeShard.load(str(folder / "images"))
        shard.update(edge.UpdateOperation.upsert_points([edge.Point(5, [1.0] * DIMENSION)]))
        shard.close()
        assert dict(store.scan(["number"])) == {"5": {}, name(1): {"number": 1}}
        assert store.retrieve(["5"]) == {"5": {}}
        (hit,) = store.search(np.ones(DIMENSION, dtype=np.float32), limit=1)
        assert (hit.id, hit.path) == ("5", "")

    @pytest.mark.parametrize("quantization", [None, "scalar", "binary"])
    @pytest.mark.parametrize("on_disk", [False, True])
    def test_the_nearest_are_found_with_their_true_scores_before_and_after_the_index_is_built(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, quantization: Quantization, on_disk: bool
    ) -> None:
        # So few points would not be indexed at all.
        optimizers = edge.EdgeOptimizersConfig(indexing_threshold=100)
        config = edge.EdgeConfig
        monkeypatch.setattr(edge_store.edge, "EdgeConfig", lambda **options: config(**options, optimizers=optimizers))
        dimension = 128
        options = StoreOptions(quantization=quantization, on_disk=on_disk)
        store = open_store(edge=folder, collection="images", options=options)
        store.create(Signature(model="m", fingerprint="0f", dimension=dimension))
        rng = np.random.default_rng(0)
        centers = rng.normal(size=(40, dimension))
        vectors = (centers[np.arange(1000) % 40] + 0.5 * rng.normal(size=(1000, dimension))).astype(np.float32)
        store.upsert([Point(name(number), vector, {"n": number}) for number, vector in enumerate(vectors)])
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        stored = json.loads((folder / "images" / "edge_config.json").read_text())["vectors"][""]
        assert stored.get("quantization_config", {}).keys() == ({quantization} - {None})
        assert stored.get("memory") == ("cold" if on_disk else None)
        for _ in range(2):
            for number in range(0, 1000, 97):
                found = store.search(vectors[number], limit=10)
                cosines = unit @ unit[number]
                wanted = np.sort(cosines)[::-1][:10]
                assert [hit.score for hit in found] == pytest.approx(wanted, abs=2e-3)
                assert [hit.score for hit in found] == pytest.approx(
                    [cosines[hit.payload["n"]] for hit in found], abs=1e-5
                )
                assert found[0].id == name(number)
                (above,) = store.search(vectors[number], limit=5, score_threshold=0.999)
                assert above.id == name(number)
            store.finish()
        store.close()
        shard = edge.EdgeShard.load(str(folder / "images"))
        assert shard.info().indexed_vectors_count == 1000
        shard.close()

    def test_an_index_that_is_built_leaves_nothing_old_behind(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        optimizers = edge.EdgeOptimizersConfig(indexing_threshold=100)
        config = edge.EdgeConfig
        monkeypatch.setattr(edge_store.edge, "EdgeConfig", lambda **options: config(**options, optimizers=optimizers))
        store = open_store(edge=folder, collection="images")
        store.create(Signature(model="m", fingerprint="0f", dimension=256))
        for _ in range(3):
            store.upsert(make_points(0, 400, 256))
            store.finish()
            assert len(list((folder / "images" / "segments").iterdir())) <= 2
        assert store.count() == 400
        store.close()

    def test_a_filter_that_cannot_be_is_wrong_usage(self, store: EdgeStore) -> None:
        store.upsert(make_points(0, 5))
        found = store.search(make_vector(1), limit=9, query_filter=parse_filters(["!mime"]))
        assert len(found) == 5
        from qdrant_client import models

        center = models.GeoPoint(lon=0, lat=0)
        near = models.FieldCondition(key="place", geo_radius=models.GeoRadius(center=center, radius=1))
        with pytest.raises(UsageError, match="no GeoRadius here"):
            store.search(make_vector(1), limit=9, query_filter=models.Filter(must=near))

    def test_a_write_that_fails_is_told_and_the_next_one_starts_from_the_disk(
        self, store: EdgeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.upsert(make_points(0, 5))
        with pytest.raises(
            CocoaError, match=rf"Qdrant Edge at .*shards did not do what was asked: No point with id {name(7)}"
        ):
            store.overwrite_payload(name(7), {})
        assert store.count() == 5
        store.upsert(make_points(5, 7))
        assert store.count() == 7

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), Exception("no")])
    def test_a_folder_that_cannot_be_written_is_named(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        store = open_store(edge=folder, collection="images")
        for step in ("lock_file", "write_atomically"):
            with monkeypatch.context() as patch:
                patch.setattr(edge_store, step, fail)
                with pytest.raises(
                    CocoaError, match=r"shards (cannot be used \(.*Input|did not do what was asked: no)"
                ):
                    store.create(SIGNATURE)
            assert store.signature() is None
        store.create(SIGNATURE)
        assert store.signature() == SIGNATURE

    def test_a_store_that_nobody_closed_says_nothing_at_the_end(self, folder: Path) -> None:
        run = run_process("edge", folder, CREATE + "store.upsert(make_points(0, 7)); print(store.count())")
        assert (run.stdout.split(), run.stderr) == (["7"], "")
        assert open_store(edge=folder, collection="images").count() == 7


class TestFullDisks:
    """The engine's mapped files end the process where the disk has no room: it is asked for room before."""

    def test_nothing_is_written_where_there_is_not_room_enough(
        self, store: EdgeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.upsert(make_points(0, 5))
        with monkeypatch.context() as patch:
            leave_free(patch, 100 * MEBIBYTE)
            with pytest.raises(CocoaError, match=r"the disk of .*shards is full: 100 MiB are free, .* needs 129 MiB"):
                store.upsert(make_points(5, 10))
            with pytest.raises(CocoaError, match="is full"):
                store.delete([name(1)])
            with pytest.raises(CocoaError, match="what was stored so far is safe"):
                store.finish()
            assert store.count() == 5
        store.upsert(make_points(5, 10))
        assert store.count() == 10

    def test_nothing_is_created_or_opened_where_there_is_not_room_enough(
        self, store: EdgeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.close()
        leave_free(monkeypatch, 10 * MEBIBYTE)
        assert store.signature() == SIGNATURE
        with pytest.raises(CocoaError, match="is full: 10 MiB are free, Qdrant Edge needs 32 MiB"):
            store.count()
        with pytest.raises(CocoaError, match="is full: 10 MiB are free, Qdrant Edge needs 128 MiB"):
            open_store(edge=folder, collection="others").create(SIGNATURE)
        assert sorted(entry.name for entry in folder.iterdir()) == [".cocoa-edge", "images"]

    def test_a_disk_that_fills_up_is_named_and_what_was_stored_stays(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 300) as disk:
            run = run_process("edge", disk / "shards", FILL)
            assert run.returncode == 0, (run.returncode, run.stderr)
            told, stored, counted, found = run.stdout.splitlines()
            assert told.startswith(f"the disk of {disk / 'shards'} is full: ")
            assert int(stored) == int(counted) > 0
            assert found == "True"
            set_disk(disk, "size=600m")
            store = open_store(edge=disk / "shards", collection="images")
            store.upsert(make_points(int(stored), int(stored) + 50))
            assert sorted(payload["number"] for _, payload in store.scan(["number"])) == list(range(int(stored) + 50))
            store.finish()
            store.close()

    def test_a_read_only_folder_is_named(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 400) as disk:
            store = open_store(edge=disk / "shards", collection="images")
            store.create(SIGNATURE)
            store.upsert(make_points(0, 3))
            store.close()
            set_disk(disk, "ro")
            for call in (store.count, lambda: store.upsert(make_points(3, 4)), lambda: store.sign(SIGNATURE)):
                with pytest.raises(CocoaError, match=r"shards cannot be used \(.*Read-only file system"):
                    call()
            with pytest.raises(CocoaError, match=r"shards cannot be used \(.*Read-only file system"):
                open_store(edge=disk / "shards", collection="others").create(SIGNATURE)
            assert store.signature() == SIGNATURE
            set_disk(disk, "rw")
            assert store.count() == 3
            store.close()


FILL = """
store.create(SIGNATURE)
stored = 0
try:
    while True:
        store.upsert(make_points(stored, stored + 200, text=os.urandom(4000).hex()))
        stored += 200
except CocoaError as error:
    print(error)
    print(stored)
    store.close()
    print(store.count())
    print(store.search(make_points(5, 6)[0].vector, limit=1)[0].id == name(5))
"""


class TestKills:
    def test_a_store_that_is_killed_has_what_it_said(self, folder: Path) -> None:
        stored = 0
        for seconds in (0.0, 0.02, 0.1, 0.5, 2.0, 8.0):
            if seconds > 0.5 and stored:
                break  # longer lives are for a machine so busy that it has stored nothing yet
            stored = run_and_kill("edge", folder, stored, seconds)
            stored = check_after_kill("edge", folder, stored)
        assert stored > 0

    @pytest.mark.slow
    def test_a_store_that_is_killed_at_random_has_what_it_said(self, tmp_path: Path) -> None:
        moments = random.Random(0)
        for run in range(6):
            stored = 0
            for _ in range(5):
                seconds = moments.random() ** 2 * 0.5
                stored = run_and_kill("edge", tmp_path / str(run), stored, seconds)
                stored = check_after_kill("edge", tmp_path / str(run), stored)

    def test_a_shard_is_not_there_before_it_is_whole(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kill at any step of a creation is one between two calls of the file system, as far as the next run sees."""
        steps: list[tuple[Any, str]] = [
            (edge_store.shutil, "rmtree"),
            (edge_store.edge.EdgeShard, "create"),
            (edge_store.edge.UpdateOperation, "create_field_index"),
            (edge_store, "write_atomically"),
            (edge_store.os, "replace"),
        ]

        class Kill(BaseException):
            pass

        def kill(*_: object, **__: object) -> None:
            raise Kill

        for owner, step in steps:
            if isinstance(owner, type):
                # The engine's own types cannot be patched; what is called of them can.
                monkeypatch.setattr(edge_store, "edge", Patched(edge, owner.__name__, step, kill))
            else:
                monkeypatch.setattr(owner, step, kill)
            store = open_store(edge=folder, collection="images")
            with pytest.raises(Kill):
                store.create(SIGNATURE)
            monkeypatch.undo()
            assert open_store(edge=folder, collection="images").signature() is None
            assert open_store(edge=folder, collection="images").collections() == []
        store = open_store(edge=folder, collection="images")
        store.create(SIGNATURE)
        store.upsert(make_points(0, 3))
        assert store.count() == 3
        store.close()


class Patched:
    """A module in which one function of one of its types is another."""

    def __init__(self, module: Any, type_name: str, function_name: str, function: Any) -> None:  # noqa: ANN401
        self._module, self._type_name = module, type_name
        self._type = Patched(getattr(module, type_name), "", "", None) if type_name else None
        if self._type is not None:
            setattr(self._type, function_name, function)

    def __getattr__(self, attribute: str) -> Any:  # noqa: ANN401
        return self._type if attribute == self._type_name else getattr(self._module, attribute)
