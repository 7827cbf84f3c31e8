"""What an indexing run costs, what it stores, and which collections it will not touch."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_model import FakeModel, colour_image, write_colours
from PIL import Image

pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient, models
from rich.console import Console

from cocoa_embed.cli.index import report_hits
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.images.load import FileContent, load_image
from cocoa_embed.integrations.qdrant import read_files as reading
from cocoa_embed.integrations.qdrant.hits_page import write_hits_page
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    client = QdrantClient(":memory:")
    yield client
    client.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    write_colours(folder, "red", "green", "blue")
    (folder / "sub").mkdir()
    colour_image("yellow").save(folder / "sub" / "yellow.jpg")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, as they are."""
    names: list[str] = []
    read = reading.read_stable_file

    def watched(path: Path) -> FileContent:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(reading, "read_stable_file", watched)
    return names


def indexer(client: QdrantClient, **options: object) -> QdrantIndexer:
    return QdrantIndexer(FakeModel(), client=client, **options)


def payloads(client: QdrantClient) -> dict[str, dict]:
    points, _ = client.scroll("images", limit=1000)
    return {Path(point.payload["path"]).name: point.payload for point in points}


def test_a_second_run_reads_no_file(client: QdrantClient, folder: Path, reads: list[str]) -> None:
    indexer(client).index(folder, progress=False)
    assert sorted(reads) == ["blue.png", "green.png", "red.png", "yellow.jpg"]
    reads.clear()
    summary = indexer(client).index(folder, progress=False)
    assert (summary.unchanged, reads) == (4, [])


def test_a_file_that_is_touched_is_read_once_and_not_embedded(
    client: QdrantClient, folder: Path, reads: list[str]
) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    os.utime(folder / "red.png", (1_000_000_000, 1_000_000_000.5))
    reads.clear()
    assert index.index(folder, progress=False).unchanged == 4
    assert payloads(client)["red.png"]["mtime"] == 1_000_000_000.5
    assert index.index(folder, progress=False).unchanged == 4
    assert reads == ["red.png"]


def test_a_change_that_keeps_the_size_is_seen_by_its_time(client: QdrantClient, folder: Path) -> None:
    Image.new("RGB", (4, 4), (1, 1, 1)).save(folder / "a.bmp")
    size = (folder / "a.bmp").stat().st_size
    index = indexer(client)
    index.index(folder, progress=False)
    Image.new("RGB", (4, 4), (200, 0, 0)).save(folder / "a.bmp")
    assert (folder / "a.bmp").stat().st_size == size
    assert index.index(folder, progress=False).replaced == 1
    assert index.search(image=folder / "a.bmp", limit=1)[0].score == pytest.approx(1)


def test_copies_are_one_point_with_all_their_paths(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    shutil.copy(folder / "red.png", folder / "sub" / "copy.png")
    assert index.index(folder, progress=False).updated == 1
    red = payloads(client)["red.png"]
    assert red["paths"] == [str(folder / "red.png"), str(folder / "sub" / "copy.png")]
    assert red["relative_paths"] == ["red.png", "sub/copy.png"]
    assert client.count("images").count == 4


def test_pruning_takes_out_what_is_gone_below_the_named_folders_alone(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    for name in ("red.png", "sub/yellow.jpg"):
        (folder / name).unlink()
    assert index.index(folder, progress=False).pruned == 0
    assert client.count("images").count == 4
    assert index.index(folder / "sub", prune=True, progress=False).pruned == 1
    assert payloads(client).keys() == {"red.png", "green.png", "blue.png"}
    assert index.index(folder, prune=True, progress=False).pruned == 1
    assert payloads(client).keys() == {"green.png", "blue.png"}


def test_pruning_a_copy_leaves_the_point_to_the_other_file(client: QdrantClient, folder: Path) -> None:
    shutil.copy(folder / "red.png", folder / "another.png")
    index = indexer(client)
    index.index(folder, progress=False)
    (folder / "another.png").unlink()
    assert index.index(folder, prune=True, progress=False).pruned == 1
    assert payloads(client)["red.png"]["paths"] == [str(folder / "red.png")]
    assert client.count("images").count == 4


def test_an_emptied_folder_can_be_pruned_and_is_an_error_otherwise(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    for path in folder.rglob("*.*"):
        path.unlink()
    with pytest.raises(CocoaError, match="there are no images in"):
        index.index(folder, progress=False)
    assert index.index(folder, prune=True, progress=False).pruned == 4
    assert client.count("images").count == 0


def test_points_of_others_are_neither_counted_nor_pruned(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    other = models.PointStruct(id=7, vector=[1.0] * 48, payload={"path": str(folder / "gone.png")})
    client.upsert("images", [other])
    assert index.index(folder, prune=True, progress=False).pruned == 0
    assert client.count("images").count == 5
    assert {hit.id for hit in index.search("red")} >= {"7"}


def test_words_that_are_taken_out_of_the_metadata_go(client: QdrantClient, folder: Path) -> None:
    metadata = folder / "metadata.jsonl"
    metadata.write_text('{"file_name": "red.png", "text": "a rose"}\n{"file_name": "blue.png", "text": "the sea"}')
    index = indexer(client)
    index.index(folder, progress=False)
    metadata.write_text('{"file_name": "blue.png", "text": "the sea"}')
    assert index.index(folder, progress=False).updated == 1
    assert {name: payload["caption"] for name, payload in payloads(client).items() if payload["caption"]} == {
        "blue.png": "the sea"
    }


def test_thumbnails_stand_beside_and_follow_their_points(client: QdrantClient, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1000, 500), "red").save(folder / "large.png")
    index = indexer(client)
    index.index(folder, progress=False)
    thumbnails = tmp_path / "thumbnails"
    assert index.index(folder, thumbnails=thumbnails, progress=False).unchanged == 5
    for payload in payloads(client).values():
        with Image.open(payload["thumbnail"]) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= 320
    with Image.open(payloads(client)["large.png"]["thumbnail"]) as image:
        assert image.size == (320, 160)
    (folder / "large.png").unlink()
    colour_image("green", (9, 9)).save(folder / "new.png")
    index.index(folder, thumbnails=thumbnails, prune=True, progress=False)
    assert sorted(thumbnails.iterdir()) == sorted(Path(payload["thumbnail"]) for payload in payloads(client).values())


def test_a_list_names_files_and_what_is_no_image_file_is_reported(
    client: QdrantClient, folder: Path, tmp_path: Path
) -> None:
    file_list = tmp_path / "list.txt"
    file_list.write_text("pictures/red.png\n\n# not this\npictures/gone.png\npictures/sub\npictures/sub/yellow.jpg\n")
    summary = indexer(client).index(file_list, progress=False)
    assert summary.indexed == 2
    assert [(Path(failure["path"]).name, failure["reason"]) for failure in summary.failed] == [
        ("gone.png", "does not exist"),
        ("sub", "is a folder, not an image"),
    ]
    assert payloads(client)["yellow.jpg"]["relative_path"] == "pictures/sub/yellow.jpg"


def test_a_pattern_names_files(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    assert index.index(folder / "**" / "*.jpg", progress=False).indexed == 1
    assert payloads(client)["yellow.jpg"]["relative_path"] == "sub/yellow.jpg"
    (folder / "sub" / "yellow.jpg").unlink()
    assert index.index(folder / "**" / "*.png", prune=True, progress=False).pruned == 1


def test_another_model_is_refused_and_both_are_named(client: QdrantClient, folder: Path) -> None:
    QdrantIndexer(Encoder(FakeModel(seed=1), "cocoa-old"), client=client).index(folder, progress=False)
    other = QdrantIndexer(Encoder(FakeModel(seed=2), "cocoa-new"), client=client)
    for use in (lambda: other.index(folder, progress=False), lambda: other.search("red")):
        with pytest.raises(
            CocoaError, match=r"was made with cocoa-old \(fingerprint .*not with cocoa-new \(fingerprint"
        ):
            use()
    assert QdrantIndexer(Encoder(FakeModel(seed=1), "renamed"), client=client).search("red")


def test_a_collection_of_others_is_searched_and_not_written_to(client: QdrantClient, folder: Path) -> None:
    client.create_collection("images", models.VectorParams(size=48, distance=models.Distance.COSINE))
    client.upsert("images", [models.PointStruct(id=1, vector=[1.0] * 48, payload={"path": "/a.png"})])
    assert [hit.path for hit in indexer(client).search("red")] == ["/a.png"]
    with pytest.raises(CocoaError, match="was not made by cocoa-embed index"):
        indexer(client).index(folder, progress=False)


def test_an_empty_collection_of_others_is_signed_and_filled(client: QdrantClient, folder: Path) -> None:
    client.create_collection("images", models.VectorParams(size=48, distance=models.Distance.COSINE))
    assert indexer(client).index(folder, progress=False).indexed == 4
    with pytest.raises(CocoaError, match="was made with"):
        QdrantIndexer(FakeModel(seed=2), client=client).search("red")


def test_embeddings_are_cut_and_a_search_knows_how_far(client: QdrantClient, folder: Path) -> None:
    indexer(client, dimension=12).index(folder, progress=False)
    points, _ = client.scroll("images", with_vectors=True)
    assert {len(point.vector) for point in points} == {12}
    assert all(np.isclose(np.linalg.norm(point.vector), 1) for point in points)
    assert indexer(client).search(image=folder / "red.png", limit=1)[0].score == pytest.approx(1)
    with pytest.raises(CocoaError, match=r"12 dimensions.* makes 24"):
        indexer(client, dimension=24).search("red")
    with pytest.raises(UsageError, match="dimension is 0"):
        indexer(client, dimension=0)


def test_the_collection_is_looked_at_before_the_model_is_loaded(tmp_path: Path, folder: Path) -> None:
    index = QdrantIndexer(tmp_path / "no-model", path=tmp_path / "none")
    with pytest.raises(CocoaError, match="there is no index in"):
        index.search("red")


def test_every_failure_is_told_in_the_order_of_the_paths(client: QdrantClient, folder: Path) -> None:
    for name, content in (("b.png", b"no image"), ("a.png", b""), ("c.png", (folder / "red.png").read_bytes()[:60])):
        (folder / name).write_bytes(content)
    summary = indexer(client).index(folder, progress=False)
    assert [Path(failure["path"]).name for failure in summary.failed] == ["a.png", "b.png", "c.png"]
    assert summary.indexed == 4


@pytest.mark.parametrize("turn", list(Image.Transpose))
def test_an_image_turned_or_mirrored_is_found_where_that_is_asked_for(
    client: QdrantClient, folder: Path, turn: Image.Transpose
) -> None:
    generator = np.random.default_rng(0)
    for number in range(5):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    index = indexer(client)
    index.index(folder, progress=False)
    turned = load_image(folder / "3.png").transpose(turn)
    assert index.search(image=turned, limit=1)[0].score < 0.999
    best, second = index.search(image=turned, limit=2, any_orientation=True)
    assert (Path(best.path).name, best.score) == ("3.png", pytest.approx(1))
    assert index.search(image=turned, limit=1, offset=1, any_orientation=True) == [second]
    assert [hit.id for hit in index.search(image=turned, score_threshold=0.999, any_orientation=True)] == [best.id]
    with pytest.raises(UsageError, match="give an image"):
        index.search("red", any_orientation=True)


def test_words_from_above_are_not_lost_when_a_part_is_indexed(client: QdrantClient, folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "sub/yellow.jpg", "text": "a lemon"}')
    colour_image("green", (9, 9)).save(folder / "sub" / "other.png")
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "other.png", "text": "a lime"}')
    index = indexer(client)
    for paths in ([folder], [folder / "sub"], [folder / "sub", folder], [folder / "sub" / "yellow.jpg"]):
        index.index(paths, progress=False)
        assert payloads(client)["yellow.jpg"]["caption"] == "a lemon"
        assert payloads(client)["other.png"]["caption"] == "a lime"
    assert payloads(client)["yellow.jpg"]["relative_path"] == "sub/yellow.jpg"


def test_a_file_that_becomes_unusable_gives_up_its_point(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    (folder / "red.png").write_bytes(b"no image any more")
    summary = index.index(folder, progress=False)
    assert [failure["path"] for failure in summary.failed] == [str(folder / "red.png")]
    assert payloads(client).keys() == {"green.png", "blue.png", "yellow.jpg"}
    for make in (lambda path: path.symlink_to("nowhere"), lambda path: path.mkdir()):
        (folder / "blue.png").unlink(missing_ok=True)
        make(folder / "blue.png")
        index.index(folder, prune=True, progress=False)
        assert "blue.png" not in payloads(client)


def test_what_cannot_be_looked_at_is_not_gone(
    client: QdrantClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    look, walk = os.stat, os.scandir

    def refuse_to_look(path: str | Path, **options: object) -> os.stat_result:
        if "/sub/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **options)

    def refuse_to_walk(path: str | Path) -> object:
        if str(path).endswith("/sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return walk(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse_to_look)
        patch.setattr(os, "scandir", refuse_to_walk)
        summary = index.index(folder, prune=True, progress=False)
    assert (summary.pruned, summary.unchanged) == (0, 3)
    assert "sub" in summary.failed[0]["path"]
    assert "yellow.jpg" in payloads(client)


def test_a_place_outside_of_the_run_is_not_forgotten(client: QdrantClient, folder: Path, tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    shutil.copy(folder / "red.png", stick / "a.png")
    index = indexer(client)
    index.index([stick, folder], progress=False)
    stick.rename(tmp_path / "unplugged")
    (folder / "red.png").rename(folder / "crimson.png")
    index.index(folder, prune=True, progress=False)
    (point,) = (each for each in payloads(client).values() if len(each["paths"]) == 2)
    assert set(point["paths"]) == {str(stick / "a.png"), str(folder / "crimson.png")}


def test_thumbnails_follow_the_folder_that_is_asked_for_and_never_become_images(
    client: QdrantClient, folder: Path, tmp_path: Path
) -> None:
    index = indexer(client)
    for name in ("one", "other"):
        index.index(folder, thumbnails=tmp_path / name, progress=False)
        assert {Path(payload["thumbnail"]).parent.name for payload in payloads(client).values()} == {name}
    with pytest.raises(UsageError, match="would be indexed with the images"):
        index.index(folder, thumbnails=folder / "small", progress=False)
    assert not (folder / "small").exists()


def test_an_empty_path_is_wrong_usage_and_not_the_current_folder(client: QdrantClient) -> None:
    for paths in ("", ["a", ""]):
        with pytest.raises(UsageError, match="a path is empty"):
            indexer(client).index(paths, progress=False)


def test_points_of_others_are_shown_whatever_they_hold(client: QdrantClient, folder: Path, tmp_path: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    strange = {"caption": ["x"], "paths": None, "thumbnail": 5, "path": "/a.png"}
    client.upsert("images", [models.PointStruct(id=1, vector=[1.0] * 48, payload=strange)])
    hits = index.search("red")
    write_hits_page(tmp_path / "hits.html", "red", hits)
    report_hits(hits, Console(stderr=True))
    assert "The image cannot be read any more" in (tmp_path / "hits.html").read_text()
