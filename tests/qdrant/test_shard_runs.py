"""Runs over shards: complete ones are skipped, and contents that are no images are remembered."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from fake_model import FakeModel
from PIL import Image
from qdrant_client import QdrantClient

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError, TransientImageError
from cocoa_embed.integrations.qdrant import IndexSummary
from cocoa_embed.integrations.qdrant.indexing import manifest, run
from cocoa_embed.integrations.qdrant.indexing.embed_records import NewPoint, PointStream
from cocoa_embed.integrations.qdrant.indexing.manifest import Manifest
from cocoa_embed.integrations.qdrant.indexing.run import IndexRun
from cocoa_embed.integrations.qdrant.indexing.thumbnails import ThumbnailFolder
from cocoa_embed.integrations.qdrant.indexing.writer import Writer
from cocoa_embed.integrations.qdrant.points import stored_locations
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import Signature
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import Record, Shard

BROKEN = b"no image"


def image(number: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), (number, 100, 200 - number)).save(file, "BMP")
    return file.getvalue()


@dataclass
class Archive:
    """A shard in memory; ``reads`` notes which records are read."""

    key: str
    version: str
    contents: dict[str, bytes | ImageError]
    error: ImageError | None = None
    reads: list[str] = field(default_factory=list)

    def records(self) -> Iterator[Record]:
        for name in self.contents:
            key = f"{self.key}#{name}"
            yield Record(key, Path(key).name, lambda name=name: self._read(name), float(self.version), shard=self.key)
        if self.error is not None:
            raise self.error

    def _read(self, name: str) -> bytes:
        self.reads.append(name)
        content = self.contents[name]
        if isinstance(content, ImageError):
            raise content
        return content


@dataclass
class Archives:
    shards_: list[Archive]
    name: str = "/data"

    def shards(self) -> Iterator[Shard]:
        return (Shard(each.key, each.records, each.version) for each in self.shards_)

    def covers(self, key: str) -> bool:
        return key.startswith("/data/")

    def is_deleted(self, key: str) -> bool:
        return not any(key.startswith(f"{shard.key}#") for shard in self.shards_)


class World:
    """Two archives of five images, one of them in both, and a collection."""

    def __init__(self) -> None:
        first = {f"{number}.bmp": image(number) for number in range(5)}
        second = {f"{number}.bmp": image(number) for number in range(4, 9)}
        self.one, self.other = Archive("/data/one.tar", "1", {**first}), Archive("/data/other.tar", "1", {**second})
        self.source = Archives([self.one, self.other])
        self.model = FakeModel()
        self.store: Store = open_store(client=QdrantClient(":memory:"), collection="images")
        self.store.create(Signature("fake", "0f", 48))
        self.manifest = Manifest(None)

    def run(self, **options: Any) -> IndexSummary:
        for archive in self.source.shards_:
            archive.reads.clear()
        self.embedded = len(self.model.documents)
        run = IndexRun([self.source], self.store, Encoder(self.model), self.manifest, **options)
        run.run(batch_size=2)
        self.embedded = len(self.model.documents) - self.embedded
        return run.summary(1.0)

    @property
    def reads(self) -> list[str]:
        return sorted(self.one.reads + self.other.reads)

    @property
    def paths(self) -> set[str]:
        return {path for _, payload in self.store.scan(["paths"]) for path in payload["paths"]}


@pytest.fixture
def world() -> World:
    world = World()
    summary = world.run()
    assert (summary.indexed, summary.updated, world.store.count()) == (9, 1, 9)
    return world


def kill(writer: Writer) -> None:
    """Do what a run does until it removes stale points."""
    writer.drain()
    raise KeyboardInterrupt


def counts(summary: IndexSummary) -> tuple[int, ...]:
    return summary.indexed, summary.unchanged, summary.updated, summary.replaced, summary.pruned, len(summary.failed)


def test_a_complete_shard_is_skipped_and_its_images_count_as_unchanged(world: World) -> None:
    world.one.records = None  # not even listed
    world.other.records = None
    assert counts(world.run()) == (0, 10, 0, 0, 0, 0)
    shards = sorted(str(payload["shard"]) for _, payload in world.store.scan(["shard"]))
    assert shards == ["/data/one.tar"] * 4 + ["/data/other.tar"] * 4 + [str(["/data/one.tar", "/data/other.tar"])]


def test_a_shard_of_another_version_is_read_again_and_only_new_content_embedded(world: World) -> None:
    world.one.version = "2"
    world.one.contents["0.bmp"] = image(50)
    assert counts(world.run()) == (0, 9, 0, 1, 0, 0)
    assert (len(world.reads), world.embedded, world.store.count()) == (5, 1, 9)
    assert counts(world.run()) == (0, 10, 0, 0, 0, 0)
    assert world.reads == []


def test_a_shard_that_lacks_a_point_in_the_collection_is_not_skipped(world: World) -> None:
    ((id_, payload),) = world.store.by_paths(["/data/one.tar#2.bmp"]).items()
    world.store.replace_payloads([(id_, payload, None)])
    assert counts(world.run()) == (1, 9, 0, 0, 0, 0)
    assert world.reads == ["2.bmp"], "the others are as they were, as their archive is"
    assert world.run().unchanged == 10


@pytest.mark.parametrize("sampled", [2, 100])
@pytest.mark.parametrize("is_other_content", [True, False])
def test_the_manifest_does_not_vouch_for_a_restored_or_another_collection(
    world: World, monkeypatch: pytest.MonkeyPatch, is_other_content: bool, sampled: int
) -> None:
    monkeypatch.setattr(manifest, "SAMPLED_POINTS", sampled)
    backup = world.store
    world.store = open_store(client=QdrantClient(":memory:"), collection="images")
    world.store.create(Signature("fake", "0f", 48))
    world.one.version = "2"
    if is_other_content:
        world.one.contents = {f"{number}.bmp": image(50 + number) for number in range(5)}
    world.run()
    assert counts(world.run()) == (0, 10, 0, 0, 0, 0)
    world.store = backup
    assert (world.run().replaced, world.embedded) == ((5, 5) if is_other_content else (0, 0))
    assert counts(world.run()) == (0, 10, 0, 0, 0, 0)
    stored = [each for _, payload in backup.scan(None) for each in stored_locations(payload)]
    assert {each.mtime for each in stored if each.path.startswith("/data/one.tar#")} == {2.0}


def test_without_the_manifest_the_result_is_the_same(world: World) -> None:
    world.manifest = Manifest(None)
    assert counts(world.run()) == (0, 10, 0, 0, 0, 0)
    assert (world.reads, world.embedded) == ([], 0)


def test_a_run_that_fails_is_finished_by_the_next_which_skips_what_is_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    insert, batches = world.store.insert, list[int]()

    def fail_at_the_end(points: Any) -> None:  # noqa: ANN401
        batches.append(len(points))
        if any("other.tar" in point.payload["path"] for point in points):
            raise CocoaError("the server is gone")
        insert(points)

    monkeypatch.setattr("cocoa_embed.integrations.qdrant.indexing.writer.BATCH_POINTS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(world.store, "insert", fail_at_the_end)
        with pytest.raises(CocoaError, match="the server is gone"):
            world.run()
    assert 0 < world.store.count() < 9
    assert sum(counts(world.run())[:3]) == 10
    assert world.store.count() == 9
    assert world.run().unchanged == 10


def test_a_run_that_is_killed_before_old_points_are_removed_is_finished_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.one.version, world.one.contents["0.bmp"] = "2", image(50)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", kill)
        with pytest.raises(KeyboardInterrupt):
            world.run()
    assert world.store.count() == 10, "the new content is stored, the old one not removed"
    assert (counts(world.run()), world.store.count()) == ((0, 9, 0, 1, 0, 0), 9)
    assert counts(world.run()) == (0, 10, 0, 0, 0, 0)


def test_a_killed_run_has_remembered_the_shards_that_have_no_stale_points(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def photograph(number: int) -> Iterator[Record]:
        yield Record("/data/p/x.bmp", "x.bmp", lambda: image(number), float(number))

    folder = Archive("/data/p", "", {})
    folder.records = lambda: photograph(4)
    world.source.shards_.insert(0, folder)
    assert world.run().updated == 1, "of a content that both archives hold"
    folder.records = lambda: photograph(60)
    world.one.version, world.other.version = "2", "2"
    world.one.contents["0.bmp"] = image(50)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", kill)
        with pytest.raises(KeyboardInterrupt):
            world.run()
    assert [world.manifest.shard(each.key) is None for each in (world.one, world.other)] == [True, False]
    world.other.records = None  # not even listed
    assert [counts(world.run()), counts(world.run())] == [(0, 9, 0, 2, 0, 0), (0, 11, 0, 0, 0, 0)]


def test_images_that_left_a_shard_are_pruned_on_request_only(world: World) -> None:
    world.other.version = "2"
    for options, pruned in (({}, 0), ({"prune": True}, 2)):
        for name in ("4.bmp", "8.bmp"):
            world.other.contents.pop(name, None)
        assert world.run(**options).pruned == pruned
        assert ("/data/other.tar#8.bmp" in world.paths) == (not pruned)
    assert "/data/one.tar#4.bmp" in world.paths
    assert (world.store.count(), world.run().unchanged) == (8, 8)
    world.source.shards_.remove(world.other)
    summary = world.run(prune=True)
    assert (summary.pruned, "3 of its 8 points would be pruned" in summary.failed[0]["reason"]) == (0, True)
    assert world.run(prune=True, prune_all=True).pruned == 3


def test_a_shard_that_was_read_without_pruning_is_read_once_to_prune_it_though_it_has_copies(world: World) -> None:
    world.one.version, world.one.contents["copy.bmp"] = "2", image(0)
    world.run()
    world.one.version = "3"
    del world.one.contents["3.bmp"]
    assert world.run().pruned == 0
    for pruned, listed in ((1, 1), (0, 0)):
        with patch.object(world.one, "records", wraps=world.one.records) as records:
            assert (world.run(prune=True).pruned, records.call_count) == (pruned, listed)
    assert "/data/one.tar#3.bmp" not in world.paths


def test_a_new_version_of_the_readers_reads_files_again_once_and_embeds_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "READER", run.READER + 1)
    for listed in (1, 0):
        with patch.object(world.one, "records", wraps=world.one.records) as records:
            assert (counts(world.run())[1], world.embedded, records.call_count) == (10, 0, listed)


def test_a_shard_that_cannot_be_read_to_its_end_is_reported_and_read_again(world: World) -> None:
    world.one.version, world.one.error = "2", ImageError("one.tar", "ends in the middle of 5.bmp")
    for _ in range(2):
        summary = world.run(prune=True)
        assert summary.failed == [{"path": "/data/one.tar", "reason": "ends in the middle of 5.bmp"}]
        assert (summary.pruned, summary.unchanged) == (0, 10)
    world.one.error = None
    world.one.version = "3"
    assert world.run().failed == []


def test_a_record_that_cannot_be_read_now_is_tried_by_the_next_run(world: World) -> None:
    world.one.version, world.one.contents["new.bmp"] = "2", ImageError("new.bmp", "timed out")
    assert [failure["reason"] for failure in world.run().failed] == ["timed out"]
    world.one.contents["new.bmp"] = image(60)
    summary = world.run()
    assert (summary.indexed, world.reads, summary.failed) == (1, ["new.bmp"], [])


class TestFaults:
    @pytest.fixture
    def broken(self, world: World) -> World:
        world.one.version, world.one.contents["0.bmp"] = "2", BROKEN
        summary = world.run()
        assert counts(summary) == (0, 9, 0, 0, 0, 1)
        assert "/data/one.tar#0.bmp" not in world.paths
        return world

    def test_a_broken_image_is_reported_by_every_run_and_read_once(self, broken: World) -> None:
        for _ in range(2):
            summary = broken.run()
            assert [failure["path"] for failure in summary.failed] == ["/data/one.tar#0.bmp"]
            assert (counts(summary), broken.reads) == ((0, 9, 0, 0, 0, 1), [])

    def test_it_is_reported_also_when_its_shard_was_read_again(self, broken: World) -> None:
        broken.manifest.reopen("/data/one.tar")
        assert [counts(broken.run()), counts(broken.run())] == [(0, 9, 0, 0, 0, 1)] * 2

    def test_its_copies_are_known_by_their_hash_and_not_decoded(
        self, broken: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken.other.version, broken.other.contents["copy.bmp"] = "2", BROKEN
        monkeypatch.setattr("cocoa_embed.encode.jobs.image_size", None)
        summary = broken.run()
        assert [failure["path"] for failure in summary.failed] == ["/data/one.tar#0.bmp", "/data/other.tar#copy.bmp"]
        assert len({failure["reason"] for failure in summary.failed}) == 1

    def test_a_new_version_of_its_shard_does_not_decode_it_again(
        self, broken: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken.one.version = "3"
        with monkeypatch.context() as patch:
            patch.setattr("cocoa_embed.encode.jobs.image_size", None)
            assert len(broken.run().failed) == 1
        broken.one.version = "4"
        del broken.one.contents["0.bmp"]
        assert [broken.run().failed, broken.run().failed] == [[], []], "it is in the shard no more"

    def test_it_is_tried_again_when_it_has_changed_or_on_request(self, broken: World) -> None:
        broken.manifest.forget_faults()
        assert (len(broken.run().failed), broken.reads) == (1, ["0.bmp"])
        assert (len(broken.run().failed), broken.reads) == (1, [])
        broken.one.version, broken.one.contents["0.bmp"] = "3", image(70)
        assert counts(broken.run()) == (1, 9, 0, 0, 0, 0)
        assert counts(broken.run()) == (0, 10, 0, 0, 0, 0)

    def test_another_version_of_the_software_tries_it_again(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world.manifest = Manifest(tmp_path / "manifest")
        world.one.version, world.one.contents["0.bmp"] = "2", BROKEN
        world.run()
        for software, reads in ((manifest.SOFTWARE, []), ("newer", ["0.bmp"]), ("newer", [])):
            monkeypatch.setattr(manifest, "SOFTWARE", software)
            world.manifest = Manifest(tmp_path / "manifest")
            assert (len(world.run().failed), world.reads) == (1, reads)

    def test_a_lack_of_memory_is_not_remembered(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        world.one.version, world.one.contents["0.bmp"] = "2", image(80)
        embed = world.model._embed

        def fail(item: Any) -> Any:  # noqa: ANN401
            raise MemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(world.model, "_embed", fail)
            assert "no memory" in world.run().failed[0]["reason"]
        assert world.model._embed == embed
        assert "/data/one.tar#0.bmp" in world.paths, "the point of what it was stays until then"
        assert counts(world.run()) == (0, 9, 0, 1, 0, 0)

    @pytest.mark.parametrize("kind", [ImageError, TransientImageError])
    def test_an_image_that_is_stored_keeps_its_point_if_it_cannot_be_decoded(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ImageError]
    ) -> None:
        def fail(data: bytes, name: str) -> Any:  # noqa: ANN401
            raise kind(name, "pillow_heif is not installed")

        before, options = world.paths, {"thumbnails": ThumbnailFolder(tmp_path / "small", "images")}
        with monkeypatch.context() as patch:
            patch.setattr("cocoa_embed.integrations.qdrant.indexing.embed_records.decode_image", fail)
            assert counts(world.run(**options)) == (0, 0, 0, 0, 0, 10)
        assert world.paths == before
        assert counts(world.run(**options)) == (0, 10, 0, 0, 0, 0)
        assert len(list((tmp_path / "small").rglob("*.jpg"))) == 9


def test_newly_requested_thumbnails_and_fields_reach_skipped_shards(world: World, tmp_path: Path) -> None:
    assert world.run(thumbnails=ThumbnailFolder(tmp_path / "small", "images")).unchanged == 10
    assert len(list((tmp_path / "small").rglob("*.jpg"))) == 9
    assert world.run(thumbnails=ThumbnailFolder(tmp_path / "small", "images"), llama_index=True).unchanged == 10
    assert all("_node_content" in payload for _, payload in world.store.scan(None))
    assert world.embedded == 0


def test_a_manifest_that_fails_midway_only_costs_work(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.manifest = Manifest(tmp_path / "manifest")
    world.one.version, world.one.contents["0.bmp"] = "2", BROKEN
    expected = counts(world.run())
    with closing(sqlite3.connect(tmp_path / "manifest")) as database:
        database.executescript("DROP TABLE complete_shards; DROP TABLE faults")
    assert caplog.messages == []
    assert [counts(world.run()), counts(world.run())] == [(0, 9, 0, 0, 0, 1)] * 2 == [expected] * 2
    (message,) = caplog.messages
    assert f"the manifest {tmp_path / 'manifest'} cannot be used (no such table" in message


class TestPointStream:
    """Points without a collection, as an embedding job writes them to files."""

    def test_every_content_becomes_a_point_with_the_records_in_flight_with_it(self, world: World) -> None:
        records = [record for shard in world.source.shards() for record in shard.records()]
        outcomes = PointStream(encoder=Encoder(FakeModel())).run(records, batch_size=4)
        made = [each for each in outcomes if isinstance(each, NewPoint)]
        assert sum(len(each.records) for each in made) == len(records) == 10
        stored = {id_: payload["sha256"] for id_, payload in world.store.scan(["sha256"])}
        assert {each.point.id: each.point.payload["sha256"] for each in made} == stored

    def test_what_cannot_be_used_is_yielded_with_its_reason(self) -> None:
        def fail() -> bytes:
            raise ImageError("x", "is gone")

        record = Record("/a.bmp", "a.bmp", lambda: image(1))
        reads: list[Callable[[], bytes]] = [record.read, lambda: BROKEN, fail]
        stream = PointStream(encoder=Encoder(FakeModel()))
        outcomes = list(stream.run(replace(record, read=read) for read in reads))
        assert [type(outcome).__name__ for outcome in outcomes].count("NewPoint") == 1
        failed = {outcome.error.reason: outcome.tried for outcome in outcomes if not isinstance(outcome, NewPoint)}
        assert failed.pop("is gone") is None
        ((reason, sha256),) = failed.items()
        assert (reason.startswith("is not an image"), len(str(sha256))) == (True, 64)
