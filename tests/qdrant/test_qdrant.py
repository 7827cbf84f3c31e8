import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from fake_model import FakeModel, colour_image, write_colours
from PIL import Image

pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient, models

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant.indexer import IndexSummary, QdrantIndexer
from cocoa_embed.integrations.qdrant.points import point_id


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


def indexer(client: QdrantClient, **options: object) -> QdrantIndexer:
    return QdrantIndexer(FakeModel(), client=client, **options)


def model_of(indexer: QdrantIndexer) -> FakeModel:
    model = indexer.encoder.model
    assert isinstance(model, FakeModel)
    return model


def counts(summary: IndexSummary) -> tuple[int, int, int, int, int]:
    return summary.indexed, summary.unchanged, summary.updated, summary.replaced, len(summary.failed)


def stored_payloads(client: QdrantClient) -> list[dict[str, Any]]:
    points, _ = client.scroll("images", limit=1000)
    return [point.payload or {} for point in points]


def stored_paths(client: QdrantClient) -> list[str]:
    return sorted(Path(payload["path"]).name for payload in stored_payloads(client))


def stored_captions(client: QdrantClient) -> dict[str, str]:
    payloads = stored_payloads(client)
    return {payload["relative_path"]: payload["caption"] for payload in payloads if payload["caption"] is not None}


def stored_vectors(client: QdrantClient) -> dict[str, Any]:
    points, _ = client.scroll("images", limit=1000, with_vectors=True)
    return {str(point.id): point.vector for point in points}


def write_captions(folder: Path, captions: Mapping[str, str], **columns: object) -> None:
    rows = [{"file_name": name, "text": text, **columns} for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_images_are_found_by_text_by_image_and_by_both(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    assert counts(index.index(folder, progress=False)) == (4, 0, 0, 0, 0)
    assert Path(index.search("a red square")[0].path) == folder / "red.png"
    assert Path(index.search(image=folder / "green.png")[0].path) == folder / "green.png"
    both = index.search("blue", colour_image("blue"), limit=2)
    assert both[0].path == str(folder / "blue.png")
    assert both[0].score > both[1].score
    assert both[0].score == pytest.approx(1, abs=1e-3)


def test_indexing_twice_adds_nothing_and_embeds_nothing(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    before = client.scroll("images", with_vectors=True)
    embedded = len(model_of(index).documents)
    summary = index.index(folder, progress=False)
    assert counts(summary) == (0, 4, 0, 0, 0)
    assert summary.images_per_second == 0
    assert len(model_of(index).documents) == embedded == 4
    assert client.scroll("images", with_vectors=True) == before


def test_the_same_content_under_two_paths_is_one_point(client: QdrantClient, folder: Path) -> None:
    shutil.copy(folder / "red.png", folder / "again.png")
    summary = indexer(client, batch_size=1).index(folder, progress=False)
    assert counts(summary) == (4, 1, 0, 0, 0)
    assert client.count("images").count == 4


def test_a_broken_jpeg_is_reported_and_the_others_are_indexed(client: QdrantClient, folder: Path) -> None:
    data = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, "JPEG")
    (folder / "broken.jpg").write_bytes(data.getvalue()[:1500])
    (folder / "empty.png").touch()
    (folder / "page.webp").write_text("<html>")
    summary = indexer(client).index(folder, progress=False)
    assert counts(summary) == (4, 0, 0, 0, 3)
    assert [Path(failure["path"]).name for failure in summary.failed] == ["broken.jpg", "empty.png", "page.webp"]
    assert summary.failed[0]["reason"].startswith("is truncated")
    assert "broken.jpg" not in stored_paths(client)


def test_an_avif_that_its_decoder_chokes_on_is_reported_and_the_others_are_indexed(
    client: QdrantClient, folder: Path
) -> None:
    colour_image("red").save(folder / "broken.avif")
    data = (folder / "broken.avif").read_bytes()
    pixels = data.index(b"mdat") + len(b"mdat")
    (folder / "broken.avif").write_bytes(data[:pixels].ljust(len(data), b"\0"))
    with pytest.raises(RuntimeError), Image.open(folder / "broken.avif") as image:
        image.load()
    summary = indexer(client).index(folder, progress=False)
    assert counts(summary) == (4, 0, 0, 0, 1)
    assert summary.failed[0]["path"] == str(folder / "broken.avif")
    assert summary.failed[0]["reason"].startswith("cannot be decoded (Failed to decode")
    assert stored_paths(client) == ["blue.png", "green.png", "red.png", "yellow.jpg"]


def test_an_image_that_the_model_refuses_does_not_take_its_batch_along(client: QdrantClient, folder: Path) -> None:
    colour_image("red", (1, 20_000)).save(folder / "thin.png")
    shutil.copy(folder / "thin.png", folder / "thin_too.png")
    summary = indexer(client).index(folder, progress=False)
    assert counts(summary) == (4, 0, 0, 0, 2)
    assert [Path(failure["path"]).name for failure in summary.failed] == ["thin.png", "thin_too.png"]
    assert "aspect ratio" in summary.failed[0]["reason"]
    assert client.count("images").count == 4


def test_an_embedding_that_is_not_finite_is_not_stored(client: QdrantClient, folder: Path) -> None:
    class Overflowing(FakeModel):
        def _embed(self, item: dict) -> np.ndarray:
            blue = "image" in item and item["image"].getpixel((0, 0)) == (0, 0, 255)
            return super()._embed(item) * (np.nan if blue else 1)

    summary = QdrantIndexer(Overflowing(), client=client).index(folder, progress=False)
    assert counts(summary) == (3, 0, 0, 0, 1)
    assert "not finite" in summary.failed[0]["reason"]
    assert "blue.png" not in stored_paths(client)


def test_a_changed_file_replaces_its_point(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    colour_image("red", (30, 30)).save(folder / "blue.png")
    assert counts(index.index(folder, progress=False)) == (0, 3, 0, 1, 0)
    assert stored_paths(client) == ["blue.png", "green.png", "red.png", "yellow.jpg"]
    assert counts(index.index(folder, progress=False)) == (0, 4, 0, 0, 0)


def test_content_that_another_file_still_holds_stays_under_that_file(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    shutil.copy(folder / "blue.png", folder / "zz.png")
    index.index(folder, progress=False)
    assert "zz.png" not in stored_paths(client)
    colour_image("red", (30, 30)).save(folder / "blue.png")
    index.index(folder, progress=False)
    assert stored_paths(client) == ["blue.png", "green.png", "red.png", "yellow.jpg", "zz.png"]
    (hit,) = index.search(image=folder / "zz.png", limit=1)
    assert (hit.path, hit.payload["relative_path"]) == (str(folder / "zz.png"), "zz.png")


def test_a_renamed_file_is_not_embedded_again_and_keeps_one_point(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    (folder / "red.png").rename(folder / "crimson.png")
    assert counts(index.index(folder, progress=False)) == (0, 3, 1, 0, 0)
    assert len(model_of(index).documents) == 4
    assert stored_paths(client) == ["blue.png", "crimson.png", "green.png", "yellow.jpg"]
    (hit,) = index.search("red", limit=1)
    assert (hit.path, hit.payload["relative_path"]) == (str(folder / "crimson.png"), "crimson.png")
    assert counts(index.index(folder, progress=False)) == (0, 4, 0, 0, 0)


def test_a_moved_file_keeps_its_caption_while_the_line_that_gave_it_is_there(
    client: QdrantClient, folder: Path
) -> None:
    write_captions(folder, {"red.png": "a red thing"}, licence="CC0")
    index = indexer(client)
    index.index(folder, progress=False)
    (folder / "red.png").rename(folder / "sub" / "crimson.png")
    summary = index.index(folder, progress=False)
    assert counts(summary) == (0, 3, 1, 0, 1)
    assert "names 'red.png', which is not in" in summary.failed[0]["reason"]
    assert stored_captions(client) == {"sub/crimson.png": "a red thing"}
    assert index.search("red", limit=1)[0].payload["metadata"] == {"licence": "CC0"}
    assert client.count("images").count == len(model_of(index).documents) == 4
    (folder / "metadata.jsonl").unlink()
    assert counts(index.index(folder, progress=False)) == (0, 3, 1, 0, 0)
    assert stored_captions(client) == {}


def test_a_moved_file_takes_the_caption_of_its_new_place(client: QdrantClient, folder: Path) -> None:
    write_captions(folder, {"red.png": "a red thing"}, licence="CC0")
    index = indexer(client)
    index.index(folder, progress=False)
    (folder / "metadata.jsonl").unlink()
    (folder / "red.png").rename(folder / "sub" / "crimson.png")
    write_captions(folder / "sub", {"crimson.png": "a ruby"}, year=1900)
    assert counts(index.index(folder, progress=False)) == (0, 3, 1, 0, 0)
    assert stored_captions(client) == {"sub/crimson.png": "a ruby"}
    assert index.search("red", limit=1)[0].payload["metadata"] == {"year": 1900}
    assert client.count("images").count == len(model_of(index).documents) == 4


def test_two_files_that_swap_their_content_swap_their_points(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    (folder / "red.png").rename(folder / "x")
    (folder / "blue.png").rename(folder / "red.png")
    (folder / "x").rename(folder / "blue.png")
    assert counts(index.index(folder, progress=False)) == (0, 2, 0, 2, 0)
    assert Path(index.search("red", limit=1)[0].path).name == "blue.png"
    assert client.count("images").count == 4


def test_captions_go_into_the_payload_and_not_into_the_embedding(client: QdrantClient, folder: Path) -> None:
    rows = [
        {"file_name": "red.png", "text": "a red thing", "licence": "CC0"},
        {"file_name": "red.png", "text": "something warm", "licence": "MIT"},
        {"file_name": "sub/yellow.jpg", "text": "a lemon"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index = indexer(client)
    index.index([folder / "sub", folder], progress=False)
    payload = index.search("red", limit=1)[0].payload
    assert payload["caption"] == "a red thing\nsomething warm"
    assert payload["metadata"] == {"licence": "CC0"}
    assert payload["relative_path"] == "red.png"
    assert (payload["width"], payload["height"], payload["mime"]) == (24, 16, "image/png")
    assert payload["bytes"] == (folder / "red.png").stat().st_size
    assert all(item.keys() == {"image"} for item in model_of(index).documents)


def test_new_captions_are_stored_without_embedding_anything_again(client: QdrantClient, folder: Path) -> None:
    write_captions(folder, {"red.png": "a red thing"}, licence="CC0")
    index = indexer(client)
    index.index(folder, progress=False)
    vectors, batches = stored_vectors(client), list(model_of(index).batches)
    assert stored_captions(client) == {"red.png": "a red thing"}
    write_captions(folder, {"red.png": "a rose", "sub/yellow.jpg": "a lemon"}, year=1900)
    summary = index.index(folder, progress=False)
    assert counts(summary) == (0, 2, 2, 0, 0)
    assert summary.images_per_second == 0
    assert stored_captions(client) == {"red.png": "a rose", "sub/yellow.jpg": "a lemon"}
    assert model_of(index).batches == batches == [4]
    assert stored_vectors(client) == vectors
    (hit,) = index.search("red", limit=1)
    assert (hit.path, hit.payload["caption"]) == (str(folder / "red.png"), "a rose")
    assert hit.payload["metadata"] == {"year": 1900}
    assert (hit.payload["width"], hit.payload["height"], hit.payload["mime"]) == (24, 16, "image/png")


@pytest.mark.parametrize(("columns", "expected"), [({"licence": "MIT"}, {"licence": "MIT"}), ({}, {})])
def test_a_column_that_changed_or_went_is_an_update(
    client: QdrantClient, folder: Path, columns: dict[str, str], expected: dict[str, str]
) -> None:
    write_captions(folder, {"red.png": "a red thing"}, licence="CC0")
    index = indexer(client)
    index.index(folder, progress=False)
    assert index.search("red", limit=1)[0].payload["metadata"] == {"licence": "CC0"}
    write_captions(folder, {"red.png": "a red thing"}, **columns)
    assert counts(index.index(folder, progress=False)) == (0, 3, 1, 0, 0)
    assert index.search("red", limit=1)[0].payload["metadata"] == expected


def test_metadata_that_say_the_same_as_before_write_nothing(client: QdrantClient, folder: Path) -> None:
    nested = {"n\udcff": ["\udcfe", 1, 0.1, None, {"deep": True}]}
    write_captions(folder, {"red.png": "a red \udcff thing", "blue.png": ""}, nested=nested)
    indexer(client).index(folder, progress=False)
    before = stored_payloads(client)
    watched = Mock(wraps=client)
    again = QdrantIndexer(FakeModel(), client=watched)
    assert counts(again.index(folder, progress=False)) == (0, 4, 0, 0, 0)
    assert {call[0] for call in watched.method_calls} == {"collection_exists", "get_collection", "scroll"}
    assert stored_payloads(client) == before
    write_captions(folder, {"red.png": "a rose", "blue.png": ""}, nested=nested)
    assert counts(again.index(folder, progress=False)) == (0, 3, 1, 0, 0)
    assert [call[0] for call in watched.method_calls].count("overwrite_payload") == 1


@pytest.mark.parametrize("part", ["sub", "sub/yellow.jpg"])
def test_a_run_that_sees_no_words_for_a_file_leaves_those_that_are_stored(
    client: QdrantClient, folder: Path, part: str
) -> None:
    write_captions(folder, {"sub/yellow.jpg": "a lemon"}, licence="CC0")
    index = indexer(client)
    index.index(folder, progress=False)
    before = stored_payloads(client)
    assert stored_captions(client) == {"sub/yellow.jpg": "a lemon"}
    assert counts(index.index(folder / part, progress=False)) == (0, 1, 0, 0, 0)
    assert stored_payloads(client) == before
    write_captions(folder / "sub", {"yellow.jpg": "a banana"})
    assert counts(index.index(folder / part, progress=False)) == (0, 0, 1, 0, 0)
    assert list(stored_captions(client).values()) == ["a banana"]


@pytest.mark.parametrize("size", [1, 32])
def test_content_at_two_paths_stays_described_by_the_file_at_the_stored_path(
    client: QdrantClient, folder: Path, size: int
) -> None:
    shutil.copy(folder / "red.png", folder / "again.png")
    write_captions(folder, {"red.png": "of red.png", "again.png": "of again.png"})
    index = indexer(client, batch_size=size)
    assert counts(index.index(folder, progress=False)) == (4, 1, 0, 0, 0)
    assert stored_captions(client) == {"again.png": "of again.png"}
    for paths, files in (
        ([folder], 5),
        ([folder / "red.png", folder / "again.png"], 2),
        ([folder / "again.png", folder / "red.png"], 2),
        ([folder / "red.png"], 1),
    ):
        assert counts(index.index(paths, progress=False)) == (0, files, 0, 0, 0)
        assert stored_captions(client) == {"again.png": "of again.png"}
    write_captions(folder, {"red.png": "new words", "again.png": "of again.png"})
    assert counts(index.index(folder, progress=False)) == (0, 5, 0, 0, 0)
    write_captions(folder, {"red.png": "new words", "again.png": "words of its own"})
    assert counts(index.index(folder, progress=False)) == (0, 4, 1, 0, 0)
    assert stored_captions(client) == {"again.png": "words of its own"}


def test_content_whose_file_is_gone_is_described_by_the_other_file_that_holds_it(
    client: QdrantClient, folder: Path
) -> None:
    shutil.copy(folder / "red.png", folder / "again.png")
    write_captions(folder, {"red.png": "of red.png", "again.png": "of again.png"})
    index = indexer(client)
    index.index(folder, progress=False)
    assert stored_captions(client) == {"again.png": "of again.png"}
    (folder / "again.png").unlink()
    write_captions(folder, {"red.png": "of red.png"})
    assert counts(index.index(folder, progress=False)) == (0, 3, 1, 0, 0)
    assert stored_captions(client) == {"red.png": "of red.png"}
    assert counts(index.index(folder, progress=False)) == (0, 4, 0, 0, 0)


def test_the_id_is_made_of_the_content(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    hits = index.search("red")
    assert all(hit.id == point_id(hit.payload["sha256"]) for hit in hits)
    assert not any(isinstance(value, bytes) or len(str(value)) > 2000 for hit in hits for value in hit.payload.values())


@pytest.mark.parametrize("line", ['{"file_name": "gone.png", "text": ""}', "{", '{"text": "no name"}'])
def test_a_line_of_metadata_that_cannot_be_used_is_reported_and_the_rest_is_done(
    client: QdrantClient, folder: Path, line: str
) -> None:
    write_captions(folder, {"red.png": "a red thing", "blue.png": "the sea"})
    index = indexer(client)
    index.index(folder, progress=False)
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "blue.png", "text": "a lake"}}\n{line}')
    summary = index.index(folder, progress=False)
    assert [failure["path"] for failure in summary.failed] == [f"{folder / 'metadata.jsonl'}:2"]
    assert counts(summary) == (0, 3, 1, 0, 1)
    assert stored_captions(client) == {"red.png": "a red thing", "blue.png": "a lake"}, "a broken file takes no words"


def test_a_folder_without_images_is_an_error(client: QdrantClient, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CocoaError, match="there are no images in"):
        indexer(client).index(tmp_path, progress=False)
    with pytest.raises(CocoaError, match="does not exist"):
        indexer(client).index(tmp_path / "nowhere", progress=False)
    with pytest.raises(CocoaError, match="there are no images in nothing"):
        indexer(client).index([], progress=False)


@pytest.mark.parametrize("size", [1, 3, 32])
def test_the_model_is_given_batches(client: QdrantClient, folder: Path, size: int) -> None:
    index = indexer(client, batch_size=size)
    index.index(folder, progress=False)
    assert model_of(index).batches == {1: [1, 1, 1, 1], 3: [3, 1], 32: [4]}[size]


def test_a_collection_of_another_dimension_is_refused_with_both_numbers(client: QdrantClient, folder: Path) -> None:
    client.create_collection("images", models.VectorParams(size=32, distance=models.Distance.COSINE))
    for use in (lambda index: index.index(folder, progress=False), lambda index: index.search("red")):
        with pytest.raises(CocoaError, match=r"32 dimensions.* makes 48; choose another collection"):
            use(indexer(client))


def test_another_distance_and_named_vectors_are_refused(client: QdrantClient, folder: Path) -> None:
    client.create_collection("dots", vectors_config=models.VectorParams(size=48, distance=models.Distance.DOT))
    client.create_collection("named", vectors_config={"v": models.VectorParams(size=48, distance="Cosine")})
    with pytest.raises(CocoaError, match=r"48 dimensions \(Dot\).*48 \(Cosine\)"):
        indexer(client, collection="dots").index(folder, progress=False)
    with pytest.raises(CocoaError, match=r"named vectors \(v\)"):
        indexer(client, collection="named").index(folder, progress=False)


def test_a_text_that_is_the_name_of_a_file_or_an_address_stays_text(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    queries = [str(folder / "red.png"), "https://example.com/red.png", "data:image/png;base64,iVBORw0KGgo="]
    for query in queries:
        index.search(query)
    assert model_of(index).queries == [{"text": query} for query in queries]


def test_limit_offset_threshold_and_filter(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    every = index.search("red")
    assert len(every) == 4
    assert index.search("red", limit=2, offset=1) == every[1:3]
    assert index.search("red", score_threshold=every[0].score - 1e-4) == every[:1]
    png = models.FieldCondition(key="mime", match=models.MatchValue(value="image/png"))
    assert len(index.search("red", query_filter=models.Filter(must=[png]))) == 3


def test_a_search_for_nothing_is_wrong_usage(client: QdrantClient, folder: Path) -> None:
    index = indexer(client)
    index.index(folder, progress=False)
    for arguments in ({}, {"text": ""}, {"text": "red", "limit": 0}, {"text": "red", "offset": -1}):
        with pytest.raises(UsageError):
            index.search(**arguments)
    with pytest.raises(CocoaError, match=r"gone\.png: does not exist"):
        index.search(image=folder / "gone.png")


def test_a_model_without_images_is_refused(client: QdrantClient, folder: Path) -> None:
    index = QdrantIndexer(FakeModel(modalities=["text"]), client=client)
    with pytest.raises(CocoaError, match="does not embed images"):
        index.index(folder, progress=False)


def test_a_model_that_takes_one_thing_at_a_time_refuses_both(client: QdrantClient, folder: Path) -> None:
    class OneAtATime(FakeModel):
        def supports(self, modality: str | tuple[str, ...]) -> bool:
            return isinstance(modality, str)

    index = QdrantIndexer(OneAtATime(), client=client)
    index.index(folder, progress=False)
    assert index.search("red")
    with pytest.raises(CocoaError, match="does not embed image and text together"):
        index.search("red", colour_image("red"))


def test_a_local_store_keeps_its_points_and_is_one_process_at_a_time(tmp_path: Path, folder: Path) -> None:
    store = tmp_path / "store"
    with QdrantIndexer(FakeModel(), path=store) as index:
        index.index(folder, progress=False)
        with pytest.raises(CocoaError, match="in use by another process"):
            QdrantIndexer(FakeModel(), path=store).search("red")
        code = f"from qdrant_client import QdrantClient; QdrantClient(path={str(store)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "already accessed by another instance" in other.stderr
    with QdrantIndexer(FakeModel(), path=store) as index:
        assert counts(index.index(folder, progress=False)) == (0, 4, 0, 0, 0)
        assert Path(index.search("blue")[0].path).name == "blue.png"


def test_a_search_creates_no_store_and_names_what_is_missing(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CocoaError, match="there is no index in"):
        QdrantIndexer(FakeModel(), path=tmp_path / "none").search("red")
    assert not (tmp_path / "none").exists()
    with QdrantIndexer(FakeModel(), path=tmp_path / "store") as index:
        index.index(folder, progress=False)
    with QdrantIndexer(FakeModel(), path=tmp_path / "store", collection="other") as index:
        with pytest.raises(CocoaError, match=r"no collection 'other' .*it holds images"):
            index.search("red")


@pytest.mark.parametrize("meta", ["{", "[]", "{}", '{"collections": null}'])
def test_a_broken_store_is_named(tmp_path: Path, folder: Path, meta: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "meta.json").write_text(meta)
    with pytest.raises(CocoaError, match="store cannot be opened"):
        QdrantIndexer(FakeModel(), path=tmp_path / "store").index(folder, progress=False)


def test_a_path_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CocoaError, match="file is a file"):
        QdrantIndexer(FakeModel(), path=tmp_path / "file").index(folder, progress=False)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CocoaError, match="holds something else"):
        QdrantIndexer(FakeModel(), path=folder).index(folder, progress=False)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_server_that_does_not_answer_is_named(folder: Path) -> None:
    with pytest.raises(CocoaError, match=r"http://127\.0\.0\.1:9"):
        QdrantIndexer(FakeModel(), url="http://127.0.0.1:9").index(folder, progress=False)


def test_two_places_for_points_are_wrong_usage(client: QdrantClient) -> None:
    with pytest.raises(UsageError, match="more than one place"):
        QdrantIndexer(FakeModel(), client=client, path="x")
    with pytest.raises(UsageError, match="batch_size is 0"):
        QdrantIndexer(FakeModel(), batch_size=0)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", 'a"b', "a\0b", "c:", "what?", "n" * 256])
def test_what_is_no_name_for_a_collection_is_wrong_usage(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a collection; use 1 to 255 bytes") as caught:
        QdrantIndexer(FakeModel(), path=tmp_path / "store", collection=name)
    assert repr(name) in str(caught.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["images", "held-out", "v1.0", "my images", "n" * 255])
def test_a_good_name_for_a_collection_is_taken_and_found_again(tmp_path: Path, folder: Path, name: str) -> None:
    with QdrantIndexer(FakeModel(), path=tmp_path / "store", collection=name) as index:
        assert counts(index.index(folder, progress=False)) == (4, 0, 0, 0, 0)
    with QdrantIndexer(FakeModel(), path=tmp_path / "store", collection=name) as index:
        assert Path(index.search("blue")[0].path).name == "blue.png"


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "localhost", "localhost:6333", "http://localhost:port", "http://localhost:0", "http://"]
)
def test_what_is_no_address_of_a_server_is_wrong_usage(url: str) -> None:
    with pytest.raises(UsageError, match=r"is no address of a Qdrant server; .*http://localhost:6333") as caught:
        QdrantIndexer(FakeModel(), url=url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:6333", "https://host/prefix", "HTTP://host", "http://[::1]:6333"])
def test_the_address_of_a_server_is_taken_as_it_is(url: str) -> None:
    assert QdrantIndexer(FakeModel(), url=url).place == url


def test_a_given_client_stays_open(client: QdrantClient, folder: Path) -> None:
    with indexer(client) as index:
        index.index(folder, progress=False)
    assert client.count("images").count == 4


def test_threads_may_share_an_indexer(tmp_path: Path, folder: Path) -> None:
    found: list[str] = []
    with QdrantIndexer(Encoder(FakeModel()), path=tmp_path / "store") as index:
        worker = threading.Thread(target=index.index, args=(folder,), kwargs={"progress": False})
        worker.start()
        worker.join()
        colour_image("red", (9, 9)).save(folder / "more.png")
        index.index(folder, progress=False)
        threads = [threading.Thread(target=lambda: found.append(index.search("blue")[0].path)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [str(folder / "blue.png")] * 8
