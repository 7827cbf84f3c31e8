"""Index and search: counts and payloads, hits, and collections that are refused."""

import json
import pickle
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from fake_model import FakeModel, colour_image, write_colours
from PIL import Image
from qdrant_client import QdrantClient, models

from cocoa_embed.cli.search import report_hits
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant import IndexSummary, QdrantIndexer
from cocoa_embed.integrations.qdrant.searching.hits_page import write_hits_page
from cocoa_embed.sources import files

COSINE = models.VectorParams(size=48, distance=models.Distance.COSINE)


class Album:
    """A folder of four images, and a collection in memory to index it into."""

    summary: IndexSummary

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_colours(folder, "red", "green", "blue")
        (folder / "sub").mkdir()
        colour_image("yellow").save(folder / "sub" / "yellow.jpg")
        self.client = QdrantClient(":memory:")
        self.index = self.indexer()
        self.search = self.index.search

    def indexer(self, model: Any = None, **options: Any) -> QdrantIndexer:  # noqa: ANN401
        return QdrantIndexer(model or FakeModel(), client=self.client, **options)

    def run(self, *paths: str | Path, **options: Any) -> tuple[int, int, int, int, int]:
        """Index the folder, or paths in it; return the counts."""
        places = [self.folder / path for path in paths] or self.folder
        self.summary = summary = self.index.index(places, progress=False, **options)
        return summary.indexed, summary.unchanged, summary.updated, summary.replaced, len(summary.failed)

    def describe(self, captions: Mapping[str, str], folder: str = ".", **columns: object) -> None:
        rows = [{"file_name": name, "text": text, **columns} for name, text in captions.items()]
        (self.folder / folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    @property
    def failures(self) -> dict[str, str]:
        return {Path(failure["path"]).name: failure["reason"] for failure in self.summary.failed}

    @property
    def payloads(self) -> dict[str, dict[str, Any]]:
        """The payloads by the name of the first file."""
        points, _ = self.client.scroll("images", limit=1000)
        return {Path(str((point.payload or {})["path"])).name: point.payload or {} for point in points}

    @property
    def captions(self) -> dict[str, str]:
        return {each["relative_path"]: each["caption"] for each in self.payloads.values() if each["caption"]}

    @property
    def vectors(self) -> dict[str, Any]:
        points, _ = self.client.scroll("images", limit=1000, with_vectors=True)
        return {str(point.id): point.vector for point in points}


@pytest.fixture
def album(tmp_path: Path) -> Album:
    return Album(tmp_path / "pictures")


class TestRuns:
    """What a run does with new, unchanged, changed, moved and deleted files."""

    def test_a_second_run_reads_no_file_and_writes_nothing(self, album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
        album.describe({"red.png": "a red \udcff thing", "blue.png": ""}, nested={"deep": [0.1, None, True]})
        assert album.run() == (4, 0, 0, 0, 0)
        assert all(item.keys() == {"image"} for item in album.index.encoder.model.documents)
        red, before = album.payloads["red.png"], (album.payloads, album.vectors)
        assert (red["path"], red["relative_path"]) == (str(album.folder / "red.png"), "red.png")
        assert (red["width"], red["height"], red["mime"]) == (24, 16, "image/png")
        monkeypatch.setattr(files, "read_stable_file", Mock(side_effect=AssertionError))
        watched = Mock(wraps=album.client)
        album.index = QdrantIndexer(FakeModel(), client=watched)
        assert album.run() == (0, 4, 0, 0, 0)
        assert album.summary.images_per_second == 0
        assert {call[0] for call in watched.method_calls} == {
            "collection_exists",
            "get_collection",
            "retrieve",
            "scroll",
        }
        assert (album.payloads, album.vectors) == before

    def test_pruning_removes_deleted_files_below_the_named_folders_only(self, album: Album) -> None:
        shutil.copy(album.folder / "red.png", album.folder / "another.png")
        stick = album.folder.parent / "stick"
        stick.mkdir()
        shutil.copy(album.folder / "green.png", stick / "a.png")
        album.run("", stick)
        for name in ("another.png", "blue.png", "sub/yellow.jpg"):
            (album.folder / name).unlink()
        stick.rename(stick.with_name("unplugged"))
        for paths, options, pruned in (([], {}, 0), (["sub"], {"prune_all": True}, 1), ([], {"prune_all": True}, 2)):
            album.run(*paths, **options)
            assert album.summary.pruned == pruned
        assert set(album.payloads) == {"red.png", "green.png"}
        assert album.payloads["red.png"]["paths"] == [str(album.folder / "red.png")]
        assert album.payloads["green.png"]["paths"] == [str(album.folder / "green.png"), str(stick / "a.png")]
        for path in album.folder.rglob("*.png"):
            path.unlink()
        album.run(prune_all=True)
        assert (album.summary.pruned, set(album.payloads)) == (2, {"a.png"})

    def test_a_file_that_becomes_unusable_loses_its_point(self, album: Album) -> None:
        album.run()
        (album.folder / "red.png").write_bytes(b"no image any more")
        album.run()
        assert (list(album.failures), set(album.payloads)) == (["red.png"], {"green.png", "blue.png", "yellow.jpg"})

    def test_foreign_points_are_neither_counted_nor_pruned(self, album: Album) -> None:
        album.run()
        strange = {"caption": ["x"], "paths": None, "thumbnail": 5, "path": str(album.folder / "gone.png")}
        album.client.upsert("images", [models.PointStruct(id=7, vector=[1.0] * 48, payload=strange)])
        album.run(prune=True)
        assert album.summary.pruned == 0
        hits = album.search("red")
        assert {hit.id for hit in hits} >= {"7"}
        write_hits_page(album.folder / "hits.html", "red", hits)
        report_hits((hit.score, hit.path, hit.caption) for hit in hits)
        assert "gone.png" in (album.folder / "hits.html").read_text()


class TestPaths:
    def test_lists_and_patterns_name_files_and_unusable_entries_are_reported(self, album: Album) -> None:
        names = ("pictures/red.png", "", "# not this", "pictures/gone.png", "pictures/sub", "pictures/sub/yellow.jpg")
        (album.folder.parent / "list.txt").write_text("\n".join(names))
        assert album.run("../list.txt") == (2, 0, 0, 0, 2)
        assert album.failures == {"gone.png": "does not exist", "sub": "is a folder, not an image"}
        assert album.payloads["yellow.jpg"]["relative_path"] == "pictures/sub/yellow.jpg"
        album.run("**/*.jpg")
        (album.folder / "sub" / "yellow.jpg").unlink()
        album.run("**/*.png", prune=True)
        assert album.summary.pruned == 1

    def test_a_file_that_is_named_twice_counts_once_more_as_unchanged(self, album: Album) -> None:
        lines = [str(album.folder / "red.png")] * 2 + ["", str(album.folder / "blue.png")]
        (album.folder.parent / "list.txt").write_text("\n".join(lines))
        assert album.run("", "../list.txt") == (4, 2, 0, 0, 0)
        assert [payload["paths"] for payload in album.payloads.values()].count([str(album.folder / "red.png")]) == 1

    def test_paths_without_images_are_an_error(self, album: Album) -> None:
        (album.folder / "notes").mkdir()
        wrong = {str(album.folder / "notes"): "are no images in", "nowhere": "does not exist", "": "a path is empty"}
        for path, words in wrong.items():
            with pytest.raises(CocoaError, match=words):
                album.index.index(path)

    def test_thumbnails_follow_their_points_and_the_given_folder(self, album: Album, tmp_path: Path) -> None:
        Image.new("RGB", (1000, 500), "red").save(album.folder / "large.png")
        album.run()
        for name in ("one", "other"):
            assert album.run(thumbnails=tmp_path / name) == (0, 5, 0, 0, 0)
            assert {Path(payload["thumbnail"]).parts[-3] for payload in album.payloads.values()} == {name}
        with Image.open(album.payloads["large.png"]["thumbnail"]) as image:
            assert (image.size, image.format) == ((320, 160), "JPEG")
        (album.folder / "large.png").unlink()
        colour_image("green", (9, 9)).save(album.folder / "new.png")
        album.run(thumbnails=tmp_path / "other", prune=True)
        named = {payload["thumbnail"] for payload in album.payloads.values()}
        assert {str(file) for file in (tmp_path / "other").rglob("*.jpg")} == named

    def test_collections_that_share_a_folder_of_thumbnails_remove_only_their_own(
        self, album: Album, tmp_path: Path
    ) -> None:
        other = album.indexer(collection="other")
        for indexer in (album.index, other):
            indexer.index(album.folder, thumbnails=tmp_path / "small", progress=False)
        other.forget(album.folder)
        assert all(Path(payload["thumbnail"]).exists() for payload in album.payloads.values())
        assert len(list((tmp_path / "small").rglob("*.jpg"))) == 4

    def test_thumbnails_of_an_index_that_was_moved_are_kept(self, album: Album, tmp_path: Path) -> None:
        small = tmp_path / "small"
        album.run(thumbnails=small)
        for file in small.glob("*/*.jpg"):  # where an earlier version stored them
            file.rename(small / file.name)
        points = dict(album.index.store.scan(None))
        moved = {id_: {**each, "thumbnail": str(small / f"{id_}.jpg")} for id_, each in points.items()}
        album.index.store.replace_payloads([(id_, points[id_], moved[id_]) for id_ in points])
        assert album.run(thumbnails=small) == (0, 4, 0, 0, 0)
        assert {Path(each["thumbnail"]).parent for each in album.payloads.values()} == {small}

    def test_thumbnails_below_the_indexed_folder_are_passed_over_also_through_links_and_patterns(
        self, album: Album
    ) -> None:
        (album.folder / "sub" / "link").symlink_to(album.folder / "small")
        (album.folder.parent / "link").symlink_to(album.folder / "small")
        for count in ((4, 0, 0, 0, 0), (0, 4, 0, 0, 0), (0, 4, 0, 0, 0)):
            assert album.run(thumbnails=album.folder / "small") == count
        assert len(list((album.folder / "small").rglob("*.jpg"))) == 4
        assert album.run("**/*.[jp][pn]g") == (0, 4, 0, 0, 0)
        for folder in ("small", "../link", "small/*/*.jpg", next((album.folder / "small").glob("*/"))):
            with pytest.raises(CocoaError, match=r"no images in|nothing matches"):
                album.run(folder)
        with pytest.raises(CocoaError, match="holds something else"):
            album.run(thumbnails=album.folder)


class TestCaptions:
    """Captions and other columns of ``metadata.jsonl`` in the payload."""

    def test_new_captions_are_stored_without_embedding_anything_again(self, album: Album) -> None:
        rows = ({"text": "a red thing", "licence": "CC0"}, {"text": "something warm", "licence": "MIT"})
        lines = (json.dumps({"file_name": "red.png", **row}) for row in rows)
        (album.folder / "metadata.jsonl").write_text("\n".join(lines))
        album.run("sub", "")
        before = album.vectors
        assert album.captions == {"red.png": "a red thing\nsomething warm"}
        assert album.payloads["red.png"]["metadata"] == {"licence": "CC0"}
        assert album.payloads["red.png"]["caption_source"] == str(album.folder / "metadata.jsonl")
        for columns in ({"year": 1}, {"year": True}, {}):
            album.describe({"red.png": "a rose", "sub/yellow.jpg": "a lemon"}, **columns)
            assert album.run() == (0, 2, 2, 0, 0)
            assert album.captions == {"red.png": "a rose", "sub/yellow.jpg": "a lemon"}
            assert repr(album.payloads["red.png"]["metadata"]) == repr(columns)
        album.describe({"sub/yellow.jpg": "a lemon"})
        assert album.run() == (0, 3, 1, 0, 0)
        assert album.captions == {"sub/yellow.jpg": "a lemon"}
        assert (len(album.index.encoder.model.documents), album.vectors) == (4, before)

    def test_a_moved_file_keeps_its_caption_until_its_source_changes(self, album: Album) -> None:
        album.describe({"red.png": "a red thing"}, licence="CC0")
        album.run()
        (album.folder / "red.png").rename(album.folder / "sub" / "crimson.png")
        assert album.run() == (0, 3, 1, 0, 1)
        assert "names 'red.png', which is not in" in album.failures["metadata.jsonl:1"]
        assert album.captions == {"sub/crimson.png": "a red thing"}
        album.describe({"crimson.png": "a ruby"}, "sub", year=1900)
        (album.folder / "metadata.jsonl").unlink()
        assert album.run() == (0, 3, 1, 0, 0)
        assert album.captions == {"sub/crimson.png": "a ruby"}
        assert album.payloads["crimson.png"]["metadata"] == {"year": 1900}
        (album.folder / "sub" / "metadata.jsonl").unlink()
        assert album.run() == (0, 3, 1, 0, 0)
        assert album.captions == {}

    @pytest.mark.parametrize("part", ["sub", "sub/yellow.jpg"])
    def test_a_run_over_a_subfolder_keeps_captions_of_the_folder_above(self, album: Album, part: str) -> None:
        colour_image("green", (9, 9)).save(album.folder / "sub" / "other.png")
        album.describe({"sub/yellow.jpg": "a lemon"}, licence="CC0")
        album.describe({"other.png": "a lime"}, "sub")
        album.run()
        before = album.payloads
        assert album.captions == {"sub/yellow.jpg": "a lemon", "sub/other.png": "a lime"}
        album.run(part)
        assert album.payloads == before
        album.describe({"yellow.jpg": "a banana"}, "sub")
        album.run(part)
        assert "a banana" in album.captions.values()

    @pytest.mark.parametrize("size", [1, 32])
    def test_the_first_file_of_a_content_describes_it_and_then_the_next(self, album: Album, size: int) -> None:
        shutil.copy(album.folder / "red.png", album.folder / "again.png")
        album.describe({"red.png": "of red.png", "again.png": "of again.png"})
        album.index = album.indexer(batch_size=size)
        assert album.run() == (4, 0, 1, 0, 0), "a copy of a stored content is an update"
        for paths in (["red.png", "again.png"], ["red.png"]):
            assert album.run(*paths) == (0, len(paths), 0, 0, 0)
            assert album.captions == {"again.png": "of again.png"}
        album.describe({"red.png": "of red.png", "again.png": "new"})
        assert album.run() == (0, 4, 1, 0, 0)
        assert album.captions == {"again.png": "new"}
        (album.folder / "again.png").unlink()
        album.describe({"red.png": "of red.png"})
        assert album.run() == (0, 3, 1, 0, 0)
        assert album.captions == {"red.png": "of red.png"}

    def test_a_broken_line_is_reported_and_removes_no_caption(self, album: Album) -> None:
        album.describe({"red.png": "a red thing", "blue.png": "the sea"})
        album.run()
        (album.folder / "metadata.jsonl").write_text('{"file_name": "blue.png", "text": "a lake"}\n{')
        assert album.run() == (0, 3, 1, 0, 1)
        assert list(album.failures) == ["metadata.jsonl:2"]
        assert album.captions == {"red.png": "a red thing", "blue.png": "a lake"}


class TestSearch:
    def test_images_are_found_by_text_by_image_and_by_both_narrowed_by_filters(self, album: Album) -> None:
        album.run()
        assert Path(album.search("a red square")[0].path) == album.folder / "red.png"
        assert Path(album.search(image=album.folder / "green.png")[0].path) == album.folder / "green.png"
        first, second = album.search("blue", colour_image("blue"), limit=2)
        assert (first.path, first.score) == (str(album.folder / "blue.png"), pytest.approx(1, abs=1e-3))
        assert album.search("blue", colour_image("blue"), limit=1, offset=1) == [second]
        assert album.search("blue", colour_image("blue"), score_threshold=first.score - 1e-4) == [first]
        png = models.FieldCondition(key="mime", match=models.MatchValue(value="image/png"))
        for condition in (models.Filter(must=[png]), "mime=image/png", ["mime=image/png", "width>1"]):
            assert len(album.search("red", query_filter=condition)) == 3

    def test_a_rotated_or_mirrored_image_is_found_on_request(self, album: Album) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        noise = Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST)
        noise.save(album.folder / "noise.png")
        album.run()
        for turned in map(noise.transpose, Image.Transpose):
            assert album.search(image=turned, limit=1)[0].score < 0.999
            best, second = album.search(image=turned, limit=2, any_orientation=True)
            assert (Path(best.path).name, best.score) == ("noise.png", pytest.approx(1))
            assert album.search(image=turned, limit=1, offset=1, any_orientation=True) == [second]

    def test_an_impossible_search_is_an_error_before_the_model_is_loaded(self, tmp_path: Path) -> None:
        index = QdrantIndexer(tmp_path / "no-model", path=tmp_path / "none")
        for arguments, error, words in (
            ({"text": ""}, UsageError, "nothing to search for; give a text, an image, or like"),
            ({"offset": -1}, UsageError, "limit must be 1 or more, offset 0 or more"),
            ({"any_orientation": True}, UsageError, "give an image"),
            ({"image": tmp_path / "gone.png"}, CocoaError, r"gone\.png: does not exist"),
            ({}, CocoaError, "there is no collection 'images' in"),
        ):
            with pytest.raises(error, match=words):
                index.search(**{"text": "red", **arguments})
        assert list(tmp_path.iterdir()) == []

    def test_threads_share_an_indexer_that_opens_again(self, album: Album, tmp_path: Path) -> None:
        with QdrantIndexer(Encoder(FakeModel()), path=tmp_path / "store", collection="my images") as album.index:
            assert album.run() == (4, 0, 0, 0, 0)
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(album.index.search, ["blue"] * 8))
        assert {hits[0].path for hits in found} == {str(album.folder / "blue.png")}
        assert album.run() == (0, 4, 0, 0, 0)
        album.index.close()


@pytest.mark.usefixtures("few_payload_indexes")
def test_an_unpickled_indexer_opens_its_collection_from_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_colours(tmp_path / "pictures", "red")
    (tmp_path / "fake").mkdir()
    for file in ("modules.json", "model.safetensors"):
        (tmp_path / "fake" / file).touch()
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda *_, **__: FakeModel())
    monkeypatch.chdir(tmp_path)
    for settings in ({}, {"path": "mine", "batch_size": 7}, {"edge": "shards", "collection": "other"}):
        with QdrantIndexer(tmp_path / "fake", **settings) as indexer:
            indexer.index("pictures", progress=False)
            pickled = pickle.dumps(indexer)
        monkeypatch.chdir("/")
        with pickle.loads(pickled) as again:
            assert [Path(hit.path).name for hit in again.search("red")] == ["red.png"]
            assert (again.batch_size, again.store.collection) == (indexer.batch_size, indexer.store.collection)
        with indexer:
            assert len(indexer.search("red")) == 1
        monkeypatch.chdir(tmp_path)


class TestModels:
    def test_options_for_loading_are_refused_with_a_loaded_model(self, album: Album) -> None:
        with pytest.raises(
            UsageError, match="max_pixels, dtype: only for a model given by its name; this one is loaded"
        ):
            album.indexer(max_pixels=784, dtype="float16", trust_remote_code=False)
        assert QdrantIndexer("a-folder", client=album.client, max_pixels=784)

    def test_another_model_is_refused_and_both_are_named(self, album: Album) -> None:
        album.index = album.indexer(Encoder(FakeModel(seed=1), "cocoa-old"))
        album.run()
        album.index = album.indexer(Encoder(FakeModel(seed=2), "cocoa-new"))
        for use in (album.run, lambda: album.index.search("red")):
            with pytest.raises(CocoaError, match=r"made with cocoa-old \(fingerprint .*not with cocoa-new \("):
                use()
        assert album.indexer(Encoder(FakeModel(seed=1), "renamed")).search("red")

    def test_a_foreign_collection_is_searched_but_filled_only_if_empty(self, album: Album) -> None:
        album.client.create_collection("images", COSINE)
        assert album.run() == (4, 0, 0, 0, 0)
        album.client.create_collection("theirs", COSINE)
        album.client.upsert("theirs", [models.PointStruct(id=1, vector=[1.0] * 48, payload={"path": "/a.png"})])
        album.index = album.indexer(collection="theirs")
        assert [hit.path for hit in album.index.search("red")] == ["/a.png"]
        with pytest.raises(CocoaError, match="was not made by cocoa-embed index"):
            album.run()

    def test_embeddings_are_cut_and_a_search_uses_the_dimension_of_the_collection(self, album: Album) -> None:
        album.index = album.indexer(dimension=12)
        album.run()
        assert {len(vector) for vector in album.vectors.values()} == {12}
        assert album.search(image=album.folder / "red.png", limit=1)[0].score == pytest.approx(1)
        with pytest.raises(CocoaError, match=r"12 dimensions.* makes 24"):
            album.indexer(dimension=24).search("red")

    def test_a_model_without_images_is_refused(self, album: Album) -> None:
        album.index = album.indexer(FakeModel(modalities=["text"]))
        with pytest.raises(CocoaError, match="does not embed images"):
            album.run()


def test_a_broken_file_is_read_once_and_again_on_request_or_when_it_has_changed(
    album: Album, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = album.folder / "broken.png"
    broken.write_bytes(b"no image")
    reads: list[Path] = []
    read = files.read_stable_file
    monkeypatch.setattr(files, "read_stable_file", lambda path: reads.append(path) or read(path))
    album.run()
    for options, count in (({}, 0), ({"retry_failed": True}, 1), ({}, 0)):
        reads.clear()
        assert album.run(**options) == (0, 4, 0, 0, 1)
        assert reads == [broken] * count
    colour_image("green", (9, 9)).save(broken)
    assert album.run() == (1, 4, 0, 0, 0)
