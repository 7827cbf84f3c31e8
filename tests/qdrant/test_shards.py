"""Embeddings that are written to files and loaded are those that indexing stores."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from fake_model import COLOURS, FakeModel, colour_image, write_colours
from qdrant_client import QdrantClient
from source_files import parquet_file, tar
from table_files import png

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.integrations.qdrant.shards import embed as embed_module
from cocoa_embed.integrations.qdrant.shards.embed import EmbedSummary, embed, parts_of, plan, total
from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder
from cocoa_embed.integrations.qdrant.shards.load import load
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.sources import shard_files
from cocoa_embed.sources.base import SourceOptions
from cocoa_embed.sources.open import all_sources


class Job:
    """Photographs, an archive, a table; a folder of embeddings, and a collection in memory."""

    def __init__(self, folder: Path, out: str) -> None:
        self.photos, self.out = folder / "photos", EmbeddingFolder(out)
        write_colours(self.photos, *COLOURS)
        shutil.copy(self.photos / "red.png", self.photos / "rouge.png")
        (self.photos / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a red thing", "licence": "CC0"}')
        (folder / "a.tar").write_bytes(tar([(f"{n}.png", png(n)) for n in range(5)] + [("4.txt", b"four")]))
        (folder / "b.parquet").write_bytes(parquet_file([{"image": png(n), "text": f"t {n}"} for n in range(3, 9)]))
        self.places: list[Any] = [self.photos, folder / "a.tar", folder / "b.parquet"]
        self.model = FakeModel()
        self.client = QdrantClient(":memory:")

    def embed(self, model: FakeModel | None = None, **options: Any) -> EmbedSummary:
        sources = all_sources(self.places, SourceOptions())
        done = embed(plan(sources, self.out, **options), self.out, Encoder(model or self.model))
        return total(done, self.out.place, lambda: 1.0)

    def load(self, **location: Any) -> tuple[int, int]:
        store = open_store(collection="images", **location or {"client": self.client})
        summary = load(self.out, store)
        return summary.files, summary.points

    def points(self, client: QdrantClient | None = None) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
        found, _ = (client or self.client).scroll("images", limit=1000, with_vectors=True)
        return {str(each.id): (np.array(each.vector), each.payload or {}) for each in found}

    def indexed(self) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
        """Return what indexing the same places stores."""
        client = QdrantClient(":memory:")
        QdrantIndexer(FakeModel(), client=client).index(self.places, progress=False)
        return self.points(client)

    def assert_loaded_is_indexed(self) -> None:
        loaded, indexed = self.points(), self.indexed()
        assert loaded.keys() == indexed.keys()
        for id_, (vector, payload) in loaded.items():
            np.testing.assert_allclose(vector, indexed[id_][0], atol=2e-3)  # float16
            assert {**payload, **dict.fromkeys(ORDER)} == {**indexed[id_][1], **dict.fromkeys(ORDER)}
            for key in ("paths", "shard"):
                assert set_of(payload.get(key)) == set_of(indexed[id_][1].get(key))


ORDER = (
    *("path", "paths", "relative_path", "relative_paths", "mtime", "mtimes", "shard", "revision"),
    *("caption", "metadata", "caption_source"),
)
"""What depends on which of several copies came first, and how often a point was merged."""


def set_of(value: Any) -> set[Any]:  # noqa: ANN401
    return set(value) if isinstance(value, list) else {value}


@pytest.fixture(params=["folder", "memory://embeddings/out"])
def job(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    # The digest of a test's own path may end a group of photographs; of this many, none does.
    monkeypatch.setattr(embed_module, "PART_RECORDS", 2**40)
    remote = "://" in request.param
    yield Job(tmp_path, request.param if remote else str(tmp_path / "out"))
    if remote:
        system = fsspec.filesystem("memory")
        system.rm("/embeddings", recursive=True) if system.exists("/embeddings") else None


def test_what_is_embedded_and_loaded_is_what_indexing_stores(job: Job) -> None:
    summary = job.embed()
    assert (summary.parts, summary.skipped, summary.embedded, summary.failed) == (3, 0, 15, [])
    assert job.load() == (3, 15)
    job.assert_loaded_is_indexed()
    captions = {payload["relative_path"]: payload["caption"] for _, payload in job.points().values()}
    assert captions["red.png"] == "a red thing"
    before = job.points()
    assert job.load() == (3, 15)
    assert {id_: payload for id_, (_, payload) in job.points().items()} == {
        id_: payload for id_, (_, payload) in before.items()
    }


def test_vectors_are_float16_and_payloads_json(job: Job) -> None:
    job.embed()
    for name in job.out.names():
        with fsspec.open(f"{job.out.place}/{name}") as file:
            table = parquet.read_table(file)
        vectors = table.schema.field("vector").type
        assert (vectors.value_type, vectors.list_size) == (pa.float16(), 48)
        assert all(json.loads(payload)["sha256"] for payload in table["payload"].to_pylist())


def test_what_is_there_is_not_embedded_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_module, "PART_RECORDS", 4)
    for number in range(60):
        colour_image("red", (20 + number, 9)).save(job.photos / f"{number:02}.png")
    first = job.embed()
    assert first.parts > 8
    fresh = FakeModel()
    again = job.embed(fresh)
    assert (again.parts, again.skipped, again.embedded) == (0, first.parts, 0)
    assert not fresh.documents
    colour_image("blue", (99, 9)).save(job.photos / "30-more.png")
    changed = job.embed(fresh)
    assert 1 <= changed.parts <= 2
    assert changed.skipped >= first.parts - 2
    assert changed.embedded <= 16 * 2
    job.load()
    job.assert_loaded_is_indexed()


def test_changed_captions_and_columns_are_embedded_again_and_the_last_ones_stay(job: Job) -> None:
    job.places = [job.photos]
    for number in range(3):
        row = {"file_name": "red.png", "text": f"caption {number}", "licence": f"licence {number}"}
        (job.photos / "metadata.jsonl").write_text(json.dumps(row))
        assert (job.embed().embedded, job.embed().skipped) == (4, 1)
        for _ in range(2):
            job.load()
            (described,) = [payload for _, payload in job.points().values() if payload["caption"]]
            assert (described["caption"], described["metadata"]) == (row["text"], {"licence": row["licence"]})
    assert len(job.out.names()) == 3, "the files of the earlier captions are there"


def test_a_list_that_cannot_be_read_is_reported_and_the_rest_is_used(job: Job, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,url\nhttps://host/1.png,b\n")
    job.places.insert(0, tmp_path / "list.csv")
    indexed = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:")).index(job.places, progress=False)
    for failed in (job.embed().failed, indexed.failed):
        assert [failure["path"] for failure in failed] == [str(tmp_path / "list.csv")]
        assert "the column 'url' twice" in failed[0]["reason"]
    job.load()
    job.assert_loaded_is_indexed()


def test_machines_share_the_parts(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_module, "PART_RECORDS", 1)
    parts = [part.name for part in parts_of(all_sources(job.places))]
    assert len(parts) == len(set(parts)) > 4
    summaries = [job.embed(number=number, count=3) for number in (1, 2, 3)]
    assert [summary.parts for summary in summaries] == [3, 2, 2]
    assert len(job.out.names()) == len(parts)
    job.load()
    job.assert_loaded_is_indexed()


def test_a_run_that_ends_early_leaves_whole_files_only(job: Job) -> None:
    class Ending(FakeModel):
        def _embed(self, item: Any) -> np.ndarray:  # noqa: ANN401
            if len(self.documents) > 6:
                raise KeyboardInterrupt
            return super()._embed(item)

    with pytest.raises(KeyboardInterrupt):
        job.embed(Ending())
    system, path = fsspec.core.url_to_fs(job.out.place)
    names = {name.rpartition("/")[2] for name in system.ls(path, detail=False)}
    assert {"cocoa-embed.json"} < names
    assert len(job.out.names()) == 1 == len(names) - 1
    assert job.load() == (1, 4)
    assert job.embed().skipped == 1
    job.load()
    job.assert_loaded_is_indexed()


def test_what_could_not_be_used_is_reported_again_and_tried_on_request(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, broken = shard_files.give, True

    def give(content: bytes | ImageError) -> bytes:
        if broken and content == png(2):
            raise ImageError("a.tar#2.png", "cannot be read (connection reset)")
        return original(content)

    monkeypatch.setattr(shard_files, "give", give)
    expected = [{"path": f"{job.places[1]}#2.png", "reason": "cannot be read (connection reset)"}]
    assert job.embed().failed == expected
    assert (job.embed().failed, job.embed().parts) == (expected, 0)
    assert job.embed(retry_failed=True).parts == 1
    broken = False
    assert job.embed().failed == expected
    retried = job.embed(retry_failed=True)
    assert (retried.parts, retried.skipped, retried.failed) == (1, 2, [])
    assert len(job.out.names()) == 3
    assert not any("failed" in name for name in job.out.names())


def test_a_part_without_a_good_image_leaves_no_file(job: Job) -> None:
    job.places = [job.places[1]]
    job.places[0].write_bytes(b"no archive")
    summary = job.embed()
    assert (summary.parts, len(summary.failed)) == (0, 1)
    assert not job.out.names()


def test_another_model_is_refused(job: Job) -> None:
    job.embed()
    with pytest.raises(CocoaError, match=r"was made with the model \(48 dimensions\), not with the model"):
        job.embed(FakeModel(seed=1))
    with pytest.raises(CocoaError, match=r"48 dimensions\), not with the model \(12\)"):
        job.embed(FakeModel(dimension=12))
    QdrantIndexer(FakeModel(seed=1), client=job.client).index(job.photos, progress=False)
    with pytest.raises(CocoaError, match="choose another collection"):
        job.load()


def test_a_folder_without_embeddings_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match=r"has no cocoa-embed\.json; name a folder that cocoa-embed embed wrote"):
        load(EmbeddingFolder(str(tmp_path / "photos")), open_store(collection="images", client=job.client))


def test_loading_merges_with_what_is_stored(job: Job, tmp_path: Path) -> None:
    """A copy that was indexed before keeps its path; a path that has another content leaves its old point."""
    other = write_colours(tmp_path / "other", "red", "green")
    QdrantIndexer(job.model, client=job.client).index([tmp_path / "other", job.photos], progress=False)
    colour_image("yellow", (70, 9)).save(job.photos / "green.png")
    os.remove(job.photos / "blue.png")
    job.embed()
    job.load()
    by_name = {Path(path).name: payload for _, payload in job.points().values() for path in payload["paths"]}
    assert set(by_name["rouge.png"]["paths"]) == {
        other[0],
        *(str(job.photos / name) for name in ("red.png", "rouge.png")),
    }
    holders = [
        payload["paths"] for _, payload in job.points().values() if str(job.photos / "green.png") in payload["paths"]
    ]
    assert holders == [[str(job.photos / "green.png")]]
    assert [other[1]] in [payload["paths"] for _, payload in job.points().values()]


@pytest.mark.parametrize("turned", [False, True])
def test_the_latest_content_of_a_path_keeps_it_whatever_the_order_of_the_files(
    job: Job, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.places = [job.photos]
    shutil.copy(job.photos / "green.png", job.photos / "vert.png")
    job.embed()
    colour_image("yellow", (70, 9)).save(job.photos / "green.png")
    os.utime(job.photos / "green.png", (2e9, 2e9))
    job.embed()
    assert len(job.out.names()) == 2
    names = job.out.names()[:: -1 if turned else 1]
    monkeypatch.setattr(EmbeddingFolder, "names", lambda _: names)
    job.load()
    path = str(job.photos / "green.png")
    (held,) = [payload for _, payload in job.points().values() if path in payload["paths"]]
    assert (held["width"], held["height"]) == (70, 9)
    (copy,) = [payload for _, payload in job.points().values() if str(job.photos / "vert.png") in payload["paths"]]
    assert copy["paths"] == [str(job.photos / "vert.png")]


def test_processes_share_the_files_and_each_is_loaded_once(job: Job, tmp_path: Path) -> None:
    job.embed()
    store = open_store(collection="images", path=tmp_path / "store")
    loaded = [load(job.out, store, number=number, count=2) for number in (1, 2)]
    assert [summary.files for summary in loaded] == [2, 1]
    assert sum(summary.points for summary in loaded) == 15
    assert store.count() == len(job.indexed())
    store.close()


@pytest.mark.usefixtures("few_payload_indexes")
@pytest.mark.parametrize("backend", ["path", "edge"])
def test_local_stores_are_loaded_too(job: Job, backend: str, tmp_path: Path) -> None:
    job.embed()
    store = open_store(collection="images", **{backend: tmp_path / "store"})
    assert load(job.out, store).points == 15
    assert store.count() == len(job.indexed())
    store.close()
