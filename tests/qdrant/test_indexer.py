"""What an indexing run stores and counts, what a search finds, and which collections are refused."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from fake_model import FakeModel, colour_image
from PIL import Image
from qdrant_client import QdrantClient, models
from rich.console import Console

from cocoa_embed.cli.index import report_hits
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.images.load import FileContent, load_image
from cocoa_embed.integrations.qdrant import IndexSummary, QdrantIndexer, read_files
from cocoa_embed.integrations.qdrant.hits_page import write_hits_page
from cocoa_embed.integrations.qdrant.points import point_id

COSINE = models.VectorParams(size=48, distance=models.Distance.COSINE)


def indexer(client: QdrantClient, **options: Any) -> QdrantIndexer:
    return QdrantIndexer(FakeModel(), client=client, **options)


def model_of(indexer: QdrantIndexer) -> FakeModel:
    model = indexer.encoder.model
    assert isinstance(model, FakeModel)
    return model


def run(index: QdrantIndexer, paths: Any, **options: Any) -> IndexSummary:  # noqa: ANN401 - a path, or several
    return index.index(paths, progress=False, **options)


def counts(summary: IndexSummary) -> tuple[int, int, int, int, int]:
    return summary.indexed, summary.unchanged, summary.updated, summary.replaced, len(summary.failed)


def failed_names(summary: IndexSummary) -> list[str]:
    return [Path(failure["path"]).name for failure in summary.failed]


def payloads(client: QdrantClient) -> dict[str, dict[str, Any]]:
    """The payloads by the name of the first file."""
    points, _ = client.scroll("images", limit=1000)
    return {Path(str((point.payload or {})["path"])).name: point.payload or {} for point in points}


def captions(client: QdrantClient) -> dict[str, str]:
    return {payload["relative_path"]: payload["caption"] for payload in payloads(client).values() if payload["caption"]}


def vectors(client: QdrantClient) -> dict[str, Any]:
    points, _ = client.scroll("images", limit=1000, with_vectors=True)
    return {str(point.id): point.vector for point in points}


def write_captions(folder: Path, captions: Mapping[str, str], **columns: object) -> None:
    rows = [{"file_name": name, "text": text, **columns} for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    read = read_files.read_stable_file

    def watched(path: Path) -> FileContent:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(read_files, "read_stable_file", watched)
    return names


class TestRuns:
    """What a run does with new, unchanged, changed, moved and deleted files."""

    def test_a_second_run_reads_no_file_and_writes_nothing(
        self, client: QdrantClient, folder: Path, reads: list[str]
    ) -> None:
        nested = {"n\udcff": ["\udcfe", 1, 0.1, None, {"deep": True}]}
        write_captions(folder, {"red.png": "a red \udcff thing", "blue.png": ""}, nested=nested)
        assert counts(run(indexer(client), folder)) == (4, 0, 0, 0, 0)
        assert sorted(reads) == ["blue.png", "green.png", "red.png", "yellow.jpg"]
        before = payloads(client), vectors(client)
        reads.clear()
        watched = Mock(wraps=client)
        summary = run(QdrantIndexer(FakeModel(), client=watched), folder)
        assert counts(summary) == (0, 4, 0, 0, 0)
        assert (summary.images_per_second, reads) == (0, [])
        assert {call[0] for call in watched.method_calls} == {"collection_exists", "get_collection", "scroll"}
        assert (payloads(client), vectors(client)) == before

    def test_the_payload_describes_the_file_and_holds_no_image(self, client: QdrantClient, folder: Path) -> None:
        index = indexer(client)
        run(index, folder)
        assert all(item.keys() == {"image"} for item in model_of(index).documents)
        red = payloads(client)["red.png"]
        assert (red["path"], red["relative_path"]) == (str(folder / "red.png"), "red.png")
        assert (red["width"], red["height"], red["mime"]) == (24, 16, "image/png")
        assert red["bytes"] == (folder / "red.png").stat().st_size
        assert red["mtime"] == pytest.approx((folder / "red.png").stat().st_mtime)
        hits = index.search("red")
        assert all(hit.id == point_id(hit.payload["sha256"]) for hit in hits)
        assert not any(isinstance(value, bytes) or len(str(value)) > 2000 for value in red.values())

    @pytest.mark.parametrize("size", [1, 3, 32])
    def test_copies_are_one_point_with_all_their_paths(self, client: QdrantClient, folder: Path, size: int) -> None:
        shutil.copy(folder / "red.png", folder / "again.png")
        index = indexer(client, batch_size=size)
        assert counts(run(index, folder)) == (4, 1, 0, 0, 0)
        assert model_of(index).batches == {1: [1, 1, 1, 1], 3: [3, 1], 32: [4]}[size]
        shutil.copy(folder / "red.png", folder / "sub" / "copy.png")
        assert counts(run(index, folder)) == (0, 5, 1, 0, 0)
        assert payloads(client)["again.png"]["relative_paths"] == ["again.png", "red.png", "sub/copy.png"]
        paths = [str(folder / name) for name in ("again.png", "red.png", "sub/copy.png")]
        assert payloads(client)["again.png"]["paths"] == paths
        assert client.count("images").count == 4

    def test_a_file_that_is_touched_is_read_once_and_not_embedded(
        self, client: QdrantClient, folder: Path, reads: list[str]
    ) -> None:
        index = indexer(client)
        run(index, folder)
        os.utime(folder / "red.png", (1_000_000_000, 1_000_000_000.5))
        reads.clear()
        for _ in range(2):
            assert run(index, folder).unchanged == 4
        assert payloads(client)["red.png"]["mtime"] == 1_000_000_000.5
        assert (reads, len(model_of(index).documents)) == (["red.png"], 4)

    def test_a_changed_file_replaces_its_point_even_if_its_size_is_the_same(
        self, client: QdrantClient, folder: Path
    ) -> None:
        Image.new("RGB", (4, 4), (1, 1, 1)).save(folder / "a.bmp")
        size = (folder / "a.bmp").stat().st_size
        index = indexer(client)
        run(index, folder)
        Image.new("RGB", (4, 4), (200, 0, 0)).save(folder / "a.bmp")
        colour_image("red", (30, 30)).save(folder / "blue.png")
        assert (folder / "a.bmp").stat().st_size == size
        assert counts(run(index, folder)) == (0, 3, 0, 2, 0)
        assert index.search(image=folder / "a.bmp", limit=1)[0].score == pytest.approx(1)
        assert payloads(client).keys() == {"a.bmp", "blue.png", "green.png", "red.png", "yellow.jpg"}
        assert counts(run(index, folder)) == (0, 5, 0, 0, 0)

    def test_content_that_another_file_still_holds_stays_under_that_file(
        self, client: QdrantClient, folder: Path
    ) -> None:
        index = indexer(client)
        shutil.copy(folder / "blue.png", folder / "zz.png")
        run(index, folder)
        colour_image("red", (30, 30)).save(folder / "blue.png")
        run(index, folder)
        assert payloads(client).keys() == {"blue.png", "green.png", "red.png", "yellow.jpg", "zz.png"}
        (hit,) = index.search(image=folder / "zz.png", limit=1)
        assert (hit.path, hit.payload["relative_path"]) == (str(folder / "zz.png"), "zz.png")

    def test_renamed_and_swapped_files_keep_their_points(self, client: QdrantClient, folder: Path) -> None:
        index = indexer(client)
        run(index, folder)
        (folder / "red.png").rename(folder / "crimson.png")
        assert counts(run(index, folder)) == (0, 3, 1, 0, 0)
        assert payloads(client).keys() == {"blue.png", "crimson.png", "green.png", "yellow.jpg"}
        assert index.search("red", limit=1)[0].payload["relative_path"] == "crimson.png"
        (folder / "crimson.png").rename(folder / "x")
        (folder / "blue.png").rename(folder / "crimson.png")
        (folder / "x").rename(folder / "blue.png")
        assert counts(run(index, folder)) == (0, 2, 0, 2, 0)
        assert Path(index.search("red", limit=1)[0].path).name == "blue.png"
        assert len(model_of(index).documents) == client.count("images").count == 4

    def test_pruning_removes_deleted_files_below_the_named_folders_only(
        self, client: QdrantClient, folder: Path, tmp_path: Path
    ) -> None:
        shutil.copy(folder / "red.png", folder / "another.png")
        stick = tmp_path / "stick"
        stick.mkdir()
        shutil.copy(folder / "green.png", stick / "a.png")
        index = indexer(client)
        run(index, [folder, stick])
        for path in (folder / "another.png", folder / "blue.png", folder / "sub" / "yellow.jpg"):
            path.unlink()
        stick.rename(tmp_path / "unplugged")
        assert run(index, folder).pruned == 0
        assert client.count("images").count == 4
        assert run(index, folder / "sub", prune=True).pruned == 1
        assert run(index, folder, prune=True).pruned == 1
        assert payloads(client).keys() == {"red.png", "green.png"}
        assert payloads(client)["red.png"]["paths"] == [str(folder / "red.png")]
        assert payloads(client)["green.png"]["paths"] == [str(folder / "green.png"), str(stick / "a.png")]
        for path in folder.rglob("*.png"):
            path.unlink()
        with pytest.raises(CocoaError, match="there are no images in"):
            run(index, folder)
        assert run(index, folder, prune=True).pruned == 2
        assert payloads(client).keys() == {"a.png"}

    def test_a_file_that_cannot_be_checked_is_not_deleted(
        self, client: QdrantClient, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = indexer(client)
        run(index, folder)
        stat, scan = os.stat, os.scandir

        def refuse(function: Callable[..., Any], part: str) -> Callable[..., Any]:
            def call(path: str | Path, **options: object) -> object:
                if part in f"{path}/":
                    raise PermissionError(13, "Permission denied", str(path))
                return function(path, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", refuse(stat, "/sub/yellow"))
            patch.setattr(os, "scandir", refuse(scan, "/sub/"))
            summary = run(index, folder, prune=True)
        assert (summary.pruned, summary.unchanged) == (0, 3)
        assert "sub" in summary.failed[0]["path"]
        assert "yellow.jpg" in payloads(client)

    def test_a_file_that_becomes_unusable_loses_its_point(self, client: QdrantClient, folder: Path) -> None:
        index = indexer(client)
        run(index, folder)
        (folder / "red.png").write_bytes(b"no image any more")
        assert failed_names(run(index, folder)) == ["red.png"]
        assert payloads(client).keys() == {"green.png", "blue.png", "yellow.jpg"}
        for make in (lambda path: path.symlink_to("nowhere"), lambda path: path.mkdir()):
            (folder / "blue.png").unlink(missing_ok=True)
            make(folder / "blue.png")
            run(index, folder, prune=True)
            assert "blue.png" not in payloads(client)

    def test_bad_images_are_reported_in_order_and_the_others_are_indexed(
        self, client: QdrantClient, folder: Path
    ) -> None:
        class Overflowing(FakeModel):
            def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
                blue = "image" in item and item["image"].getpixel((0, 0)) == (0, 0, 255)
                return super()._embed(item) * (np.nan if blue else 1)

        data = BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(data, "JPEG")
        (folder / "broken.jpg").write_bytes(data.getvalue()[:1500])
        (folder / "empty.png").touch()
        (folder / "page.webp").write_text("<html>")
        colour_image("red", (1, 20_000)).save(folder / "thin.png")
        shutil.copy(folder / "thin.png", folder / "thin_too.png")
        colour_image("red").save(folder / "a.avif")
        avif = (folder / "a.avif").read_bytes()
        (folder / "a.avif").write_bytes(avif[: avif.index(b"mdat") + 4].ljust(len(avif), b"\0"))
        summary = run(QdrantIndexer(Overflowing(), client=client), folder)
        assert counts(summary) == (3, 0, 0, 0, 7)
        reasons = {Path(failure["path"]).name: failure["reason"] for failure in summary.failed}
        assert list(reasons) == sorted(reasons)
        for name, words in (
            ("a.avif", "cannot be decoded (Failed to decode"),
            ("blue.png", "not finite"),
            ("broken.jpg", "is truncated"),
            ("empty.png", "is empty"),
            ("page.webp", "image"),
            ("thin.png", "aspect ratio"),
            ("thin_too.png", "aspect ratio"),
        ):
            assert words in reasons[name]
        assert payloads(client).keys() == {"green.png", "red.png", "yellow.jpg"}

    def test_points_of_another_program_are_neither_counted_nor_pruned(
        self, client: QdrantClient, folder: Path, tmp_path: Path
    ) -> None:
        index = indexer(client)
        run(index, folder)
        strange = {"caption": ["x"], "paths": None, "thumbnail": 5, "path": str(folder / "gone.png")}
        client.upsert("images", [models.PointStruct(id=7, vector=[1.0] * 48, payload=strange)])
        assert run(index, folder, prune=True).pruned == 0
        hits = index.search("red")
        assert {hit.id for hit in hits} >= {"7"}
        write_hits_page(tmp_path / "hits.html", "red", hits)
        report_hits(hits, Console(stderr=True))
        assert "gone.png" in (tmp_path / "hits.html").read_text()


class TestPaths:
    def test_a_list_names_files_and_what_is_no_image_file_is_reported(
        self, client: QdrantClient, folder: Path, tmp_path: Path
    ) -> None:
        names = ("pictures/red.png", "", "# not this", "pictures/gone.png", "pictures/sub", "pictures/sub/yellow.jpg")
        (tmp_path / "list.txt").write_text("\n".join(names))
        summary = run(indexer(client), tmp_path / "list.txt")
        assert summary.indexed == 2
        assert [(Path(failure["path"]).name, failure["reason"]) for failure in summary.failed] == [
            ("gone.png", "does not exist"),
            ("sub", "is a folder, not an image"),
        ]
        assert payloads(client)["yellow.jpg"]["relative_path"] == "pictures/sub/yellow.jpg"

    def test_a_pattern_names_files(self, client: QdrantClient, folder: Path) -> None:
        index = indexer(client)
        assert run(index, folder / "**" / "*.jpg").indexed == 1
        assert payloads(client)["yellow.jpg"]["relative_path"] == "sub/yellow.jpg"
        (folder / "sub" / "yellow.jpg").unlink()
        assert run(index, folder / "**" / "*.png", prune=True).pruned == 1

    @pytest.mark.parametrize(
        ("paths", "error", "words"),
        [
            ("notes", CocoaError, "there are no images in"),
            ("nowhere", CocoaError, "does not exist"),
            ([], CocoaError, "there are no images in nothing"),
            ("", UsageError, "a path is empty"),
            (["a", ""], UsageError, "a path is empty"),
        ],
    )
    def test_paths_without_images_are_an_error(
        self,
        client: QdrantClient,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        paths: str | list[str],
        error: type[Exception],
        words: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "notes.txt").touch()
        with pytest.raises(error, match=words):
            run(indexer(client), paths)

    def test_thumbnails_follow_their_points_and_the_folder_that_is_given(
        self, client: QdrantClient, folder: Path, tmp_path: Path
    ) -> None:
        Image.new("RGB", (1000, 500), "red").save(folder / "large.png")
        index = indexer(client)
        run(index, folder)
        for name in ("one", "other"):
            assert run(index, folder, thumbnails=tmp_path / name).unchanged == 5
            assert {Path(payload["thumbnail"]).parent.name for payload in payloads(client).values()} == {name}
        with Image.open(payloads(client)["large.png"]["thumbnail"]) as image:
            assert (image.size, image.format) == ((320, 160), "JPEG")
        (folder / "large.png").unlink()
        colour_image("green", (9, 9)).save(folder / "new.png")
        run(index, folder, thumbnails=tmp_path / "other", prune=True)
        named = [Path(payload["thumbnail"]) for payload in payloads(client).values()]
        assert sorted((tmp_path / "other").iterdir()) == sorted(named)
        with pytest.raises(UsageError, match="would be indexed with the images"):
            run(index, folder, thumbnails=folder / "small")
        assert not (folder / "small").exists()


class TestCaptions:
    """Captions and other columns of ``metadata.jsonl`` in the payload."""

    def test_new_captions_are_stored_without_embedding_anything_again(self, client: QdrantClient, folder: Path) -> None:
        rows = [
            {"file_name": "red.png", "text": "a red thing", "licence": "CC0"},
            {"file_name": "red.png", "text": "something warm", "licence": "MIT"},
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        index = indexer(client)
        run(index, [folder / "sub", folder])
        before = vectors(client)
        assert captions(client) == {"red.png": "a red thing\nsomething warm"}
        assert payloads(client)["red.png"]["metadata"] == {"licence": "CC0"}
        write_captions(folder, {"red.png": "a rose", "sub/yellow.jpg": "a lemon"}, year=1900)
        assert counts(run(index, folder)) == (0, 2, 2, 0, 0)
        assert captions(client) == {"red.png": "a rose", "sub/yellow.jpg": "a lemon"}
        assert payloads(client)["red.png"]["metadata"] == {"year": 1900}
        assert payloads(client)["red.png"]["caption_source"] == str(folder / "metadata.jsonl")
        for columns in ({"year": True}, {}):
            write_captions(folder, {"red.png": "a rose", "sub/yellow.jpg": "a lemon"}, **columns)
            assert counts(run(index, folder)) == (0, 2, 2, 0, 0)
            assert payloads(client)["red.png"]["metadata"] == columns
        write_captions(folder, {"sub/yellow.jpg": "a lemon"})
        assert counts(run(index, folder)) == (0, 3, 1, 0, 0)
        assert captions(client) == {"sub/yellow.jpg": "a lemon"}
        assert (model_of(index).batches, vectors(client)) == ([4], before)

    def test_a_moved_file_keeps_its_caption_until_its_source_changes(self, client: QdrantClient, folder: Path) -> None:
        write_captions(folder, {"red.png": "a red thing"}, licence="CC0")
        index = indexer(client)
        run(index, folder)
        (folder / "red.png").rename(folder / "sub" / "crimson.png")
        summary = run(index, folder)
        assert counts(summary) == (0, 3, 1, 0, 1)
        assert "names 'red.png', which is not in" in summary.failed[0]["reason"]
        assert captions(client) == {"sub/crimson.png": "a red thing"}
        write_captions(folder / "sub", {"crimson.png": "a ruby"}, year=1900)
        (folder / "metadata.jsonl").unlink()
        assert counts(run(index, folder)) == (0, 3, 1, 0, 0)
        assert captions(client) == {"sub/crimson.png": "a ruby"}
        assert payloads(client)["crimson.png"]["metadata"] == {"year": 1900}
        (folder / "sub" / "metadata.jsonl").unlink()
        assert counts(run(index, folder)) == (0, 3, 1, 0, 0)
        assert captions(client) == {}

    @pytest.mark.parametrize("part", ["sub", "sub/yellow.jpg"])
    def test_a_run_over_a_part_keeps_captions_from_above(self, client: QdrantClient, folder: Path, part: str) -> None:
        write_captions(folder, {"sub/yellow.jpg": "a lemon"}, licence="CC0")
        colour_image("green", (9, 9)).save(folder / "sub" / "other.png")
        write_captions(folder / "sub", {"other.png": "a lime"})
        index = indexer(client)
        run(index, folder)
        before = payloads(client)
        assert captions(client) == {"sub/yellow.jpg": "a lemon", "sub/other.png": "a lime"}
        assert run(index, folder / part).updated == 0
        assert payloads(client) == before
        write_captions(folder / "sub", {"yellow.jpg": "a banana"})
        assert run(index, folder / part).updated == 1 + (part == "sub")
        assert "a banana" in captions(client).values()

    @pytest.mark.parametrize("size", [1, 32])
    def test_the_first_file_of_a_content_describes_it_and_then_the_next(
        self, client: QdrantClient, folder: Path, size: int
    ) -> None:
        shutil.copy(folder / "red.png", folder / "again.png")
        write_captions(folder, {"red.png": "of red.png", "again.png": "of again.png"})
        index = indexer(client, batch_size=size)
        assert counts(run(index, folder)) == (4, 1, 0, 0, 0)
        red, again = folder / "red.png", folder / "again.png"
        for paths, files in (([folder], 5), ([red, again], 2), ([again, red], 2), ([red], 1)):
            assert counts(run(index, paths)) == (0, files, 0, 0, 0)
            assert captions(client) == {"again.png": "of again.png"}
        write_captions(folder, {"red.png": "of red.png", "again.png": "new"})
        assert counts(run(index, folder)) == (0, 4, 1, 0, 0)
        assert captions(client) == {"again.png": "new"}
        again.unlink()
        write_captions(folder, {"red.png": "of red.png"})
        assert counts(run(index, folder)) == (0, 3, 1, 0, 0)
        assert captions(client) == {"red.png": "of red.png"}
        assert counts(run(index, folder)) == (0, 4, 0, 0, 0)

    @pytest.mark.parametrize("line", ['{"file_name": "gone.png", "text": ""}', "{", '{"text": "no name"}'])
    def test_a_broken_line_is_reported_and_removes_no_caption(
        self, client: QdrantClient, folder: Path, line: str
    ) -> None:
        write_captions(folder, {"red.png": "a red thing", "blue.png": "the sea"})
        index = indexer(client)
        run(index, folder)
        (folder / "metadata.jsonl").write_text(f'{{"file_name": "blue.png", "text": "a lake"}}\n{line}')
        summary = run(index, folder)
        assert failed_names(summary) == ["metadata.jsonl:2"]
        assert counts(summary) == (0, 3, 1, 0, 1)
        assert captions(client) == {"red.png": "a red thing", "blue.png": "a lake"}


class TestSearch:
    def test_images_are_found_by_text_by_image_and_by_both(self, client: QdrantClient, folder: Path) -> None:
        index = indexer(client)
        run(index, folder)
        assert Path(index.search("a red square")[0].path) == folder / "red.png"
        assert Path(index.search(image=folder / "green.png")[0].path) == folder / "green.png"
        first, second = index.search("blue", colour_image("blue"), limit=2)
        assert (first.path, first.score) == (str(folder / "blue.png"), pytest.approx(1, abs=1e-3))
        assert first.score > second.score
        texts = [str(folder / "red.png"), "https://example.com/red.png", "data:image/png;base64,iVBORw0KGgo="]
        for text in texts:
            index.search(text)
        assert model_of(index).queries[-3:] == [{"text": text} for text in texts], "a text is always text"

    def test_limit_offset_threshold_and_filter(self, client: QdrantClient, folder: Path) -> None:
        index = indexer(client)
        run(index, folder)
        every = index.search("red")
        assert len(every) == 4
        assert index.search("red", limit=2, offset=1) == every[1:3]
        assert index.search("red", score_threshold=every[0].score - 1e-4) == every[:1]
        png = models.FieldCondition(key="mime", match=models.MatchValue(value="image/png"))
        for condition in (models.Filter(must=[png]), "mime=image/png", ["mime=image/png", "width>1"]):
            assert len(index.search("red", query_filter=condition)) == 3

    @pytest.mark.parametrize("turn", list(Image.Transpose))
    def test_a_rotated_or_mirrored_image_is_found_on_request(
        self, client: QdrantClient, folder: Path, turn: Image.Transpose
    ) -> None:
        generator = np.random.default_rng(0)
        for number in range(5):
            pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST).save(folder / f"{number}.png")
        index = indexer(client)
        run(index, folder)
        turned = load_image(folder / "3.png").transpose(turn)
        assert index.search(image=turned, limit=1)[0].score < 0.999
        best, second = index.search(image=turned, limit=2, any_orientation=True)
        assert (Path(best.path).name, best.score) == ("3.png", pytest.approx(1))
        assert index.search(image=turned, limit=1, offset=1, any_orientation=True) == [second]
        found = index.search(image=turned, score_threshold=0.999, any_orientation=True)
        assert [hit.id for hit in found] == [best.id]

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"text": ""},
            {"text": "red", "limit": 0},
            {"text": "a", "offset": -1},
            {"text": "a", "any_orientation": 1},
        ],
    )
    def test_an_impossible_search_is_wrong_usage(self, client: QdrantClient, arguments: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="; "):
            indexer(client).search(**arguments)

    def test_a_search_creates_nothing_and_names_what_is_missing_before_the_model_is_loaded(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(CocoaError, match="there is no index in"):
            QdrantIndexer(tmp_path / "no-model", path=tmp_path / "none").search("red")
        with pytest.raises(CocoaError, match=r"gone\.png: does not exist"):
            QdrantIndexer(tmp_path / "no-model", path=tmp_path / "none").search(image=tmp_path / "gone.png")
        assert list(tmp_path.iterdir()) == []

    def test_threads_may_share_an_indexer(self, tmp_path: Path, folder: Path) -> None:
        found: list[str] = []
        with QdrantIndexer(Encoder(FakeModel()), path=tmp_path / "store", collection="my images") as index:
            run(index, folder)
            threads = [threading.Thread(target=lambda: found.append(index.search("blue")[0].path)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert found == [str(folder / "blue.png")] * 8
        with QdrantIndexer(FakeModel(), path=tmp_path / "store", collection="my images") as index:
            assert counts(run(index, folder)) == (0, 4, 0, 0, 0)


class TestModels:
    def test_another_model_is_refused_and_both_are_named(self, client: QdrantClient, folder: Path) -> None:
        run(QdrantIndexer(Encoder(FakeModel(seed=1), "cocoa-old"), client=client), folder)
        other = QdrantIndexer(Encoder(FakeModel(seed=2), "cocoa-new"), client=client)
        for use in (lambda: run(other, folder), lambda: other.search("red")):
            with pytest.raises(CocoaError, match=r"made with cocoa-old \(fingerprint .*not with cocoa-new \(fingerpri"):
                use()
        assert QdrantIndexer(Encoder(FakeModel(seed=1), "renamed"), client=client).search("red")

    def test_a_collection_of_another_program_is_searched_and_only_filled_if_it_is_empty(
        self, client: QdrantClient, folder: Path
    ) -> None:
        for collection in ("theirs", "images"):
            client.create_collection(collection, COSINE)
        client.upsert("theirs", [models.PointStruct(id=1, vector=[1.0] * 48, payload={"path": "/a.png"})])
        index = indexer(client, collection="theirs")
        assert [hit.path for hit in index.search("red")] == ["/a.png"]
        with pytest.raises(CocoaError, match="was not made by cocoa-embed index"):
            run(index, folder)
        assert run(indexer(client), folder).indexed == 4
        with pytest.raises(CocoaError, match="was made with"):
            QdrantIndexer(FakeModel(seed=2), client=client).search("red")

    def test_embeddings_are_cut_and_a_search_uses_the_dimension_of_the_collection(
        self, client: QdrantClient, folder: Path
    ) -> None:
        run(indexer(client, dimension=12), folder)
        assert {len(vector) for vector in vectors(client).values()} == {12}
        assert all(np.isclose(np.linalg.norm(vector), 1) for vector in vectors(client).values())
        assert indexer(client).search(image=folder / "red.png", limit=1)[0].score == pytest.approx(1)
        with pytest.raises(CocoaError, match=r"12 dimensions.* makes 24"):
            indexer(client, dimension=24).search("red")
        client.create_collection("small", models.VectorParams(size=32, distance=models.Distance.COSINE))
        small = indexer(client, collection="small")
        for use in (lambda: run(small, folder), lambda: small.search("red")):
            with pytest.raises(CocoaError, match=r"32 dimensions.* makes 48; choose another collection"):
                use()

    def test_a_model_that_does_not_take_images_or_both_is_refused(self, client: QdrantClient, folder: Path) -> None:
        class OneAtATime(FakeModel):
            def supports(self, modality: str | tuple[str, ...]) -> bool:
                return isinstance(modality, str)

        with pytest.raises(CocoaError, match="does not embed images"):
            run(QdrantIndexer(FakeModel(modalities=["text"]), client=client), folder)
        index = QdrantIndexer(OneAtATime(), client=client)
        run(index, folder)
        assert index.search("red")
        with pytest.raises(CocoaError, match="does not embed image and text together"):
            index.search("red", colour_image("red"))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"client": Mock(), "path": "x"}, "more than one place"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"dimension": 0}, "dimension is 0"),
            ({"path": "x", "collection": "a/b"}, "is no name for a collection"),
        ],
    )
    def test_wrong_arguments_are_wrong_usage(self, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            QdrantIndexer(FakeModel(), **arguments)
        assert QdrantIndexer(FakeModel(), url="http://[::1]:6333").location == "http://[::1]:6333"
