"""Captions that are embedded: vectors embed the caption of the payload, and only what has changed is embedded."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import COLOURS, FakeModel, write_colours
from fake_qdrant import FakeServer, Handler, drop
from qdrant_client import QdrantClient

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.images.load import load_image
from cocoa_embed.integrations.qdrant import IndexSummary, QdrantIndexer
from cocoa_embed.integrations.qdrant.indexing.merge import Change, Merger
from cocoa_embed.integrations.qdrant.points import caption_of
from cocoa_embed.integrations.qdrant.shards.embed import embed as embed_parts
from cocoa_embed.integrations.qdrant.shards.embed import plan
from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder
from cocoa_embed.integrations.qdrant.shards.load import load
from cocoa_embed.integrations.qdrant.stores.base import BOTH, IMAGE, TOGETHER, NewVector
from cocoa_embed.sources.base import Record
from cocoa_embed.sources.open import all_sources

pytestmark = pytest.mark.usefixtures("few_payload_indexes")


class Album:
    """Images of four colours with captions, and a collection that embeds them."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        write_colours(folder, *COLOURS)
        self.model = FakeModel()
        self.indexer = QdrantIndexer(self.model, **options)
        self.describe(red="a red thing", green="blue")

    def describe(self, folder: str = "", **captions: str) -> None:
        rows = [{"file_name": f"{name}.png", "text": text} for name, text in captions.items()]
        (self.folder / folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(self, **options: Any) -> IndexSummary:
        self.model.documents.clear()
        return self.indexer.index(self.folder, progress=False, **options)

    @property
    def embedded(self) -> list[tuple[str, ...]]:
        """What the last run has embedded: the keys of each input."""
        return sorted(tuple(sorted(item)) for item in self.model.documents)

    def captions(self, embed: str) -> dict[str, str | None]:
        """Return the captions by file, after a check that the vectors embed image and caption of the payload."""
        encoder, found = Encoder(FakeModel()), {}
        for _, payload, vector, caption_vector, _ in self.indexer.store.points(with_vectors=True):
            image, caption = load_image(payload["path"]), caption_of(payload)
            text: Any = {} if caption is None else {"text": caption}
            whole = {"image": image} | (text if embed == TOGETHER else {})
            assert vector is not None
            np.testing.assert_allclose(vector, encoder.embed_documents([whole])[0], atol=1e-3)
            assert (caption_vector is not None) == (embed == BOTH and caption is not None)
            if caption_vector is not None:
                np.testing.assert_allclose(caption_vector, encoder.embed_documents([text])[0], atol=1e-3)
            found[payload["relative_path"]] = caption
        return found


@pytest.fixture(params=[TOGETHER, BOTH])
def embed(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["client", "path", "url", "edge"])
def album(request: pytest.FixtureRequest, embed: str, tmp_path: Path, server: FakeServer) -> Iterator[Album]:
    given = {"client": server.client, "url": server.url}
    place = {request.param: given.get(request.param, tmp_path / "store")}
    album = Album(tmp_path / "photos", embed=embed, **place)
    yield album
    album.indexer.close()


def test_what_is_stored_embeds_the_captions_and_a_run_embeds_only_what_changed(album: Album, embed: str) -> None:
    both, image = ("image", "text"), ("image",)
    album.run()
    assert album.embedded == sorted([both, both, image, image] if embed == TOGETHER else [image] * 4 + [("text",)] * 2)
    captions = {"red.png": "a red thing", "green.png": "blue", "blue.png": None, "yellow.png": None}
    assert album.captions(embed) == captions
    assert (album.run().unchanged, album.embedded) == (4, [])
    album.describe(red="green", blue="a sky")
    assert (album.run().updated, album.indexer.store.count()) == (3, 4)
    assert album.embedded == sorted([both, both, image] if embed == TOGETHER else [("text",)] * 2)
    assert album.captions(embed) == {**captions, "red.png": "green", "green.png": None, "blue.png": "a sky"}
    assert (album.run().unchanged, album.embedded) == (4, [])


def test_a_copy_describes_the_content_when_the_first_file_is_gone(album: Album, embed: str) -> None:
    album.run()
    (album.folder / "sub").mkdir()
    shutil.copy(album.folder / "red.png", album.folder / "sub" / "rouge.png")
    album.describe("sub", rouge="yellow")
    assert (album.run().updated, album.embedded) == (1, []), "the first file describes it"
    assert album.captions(embed)["red.png"] == "a red thing"
    (album.folder / "red.png").unlink()
    album.run(prune=True)
    assert album.captions(embed)["sub/rouge.png"] == "yellow"
    assert album.embedded == [("image", "text") if embed == TOGETHER else ("text",)]
    album.indexer.forget(album.folder / "sub")
    assert len(album.captions(embed)) == 3


def test_a_search_finds_images_by_what_is_embedded(album: Album, embed: str) -> None:
    album.describe(red="blue")
    album.run()
    found = [Path(hit.path).name for hit in album.indexer.search("blue", limit=2)]
    assert set(found) == {"blue.png", "red.png"}, "one by its image, one by its caption"
    options: list[dict[str, Any]] = [{"diversity": 0.3}, {"group_by": "mime"}, {"offset": 3}, {"exact": True}]
    assert [len(album.indexer.search("blue", limit=2, **each)) for each in options] == [2, 1, 1, 2]
    (hit,) = album.indexer.search("blue", query_filter="relative_path=red.png")
    assert (hit.caption, hit.score > 0.6) == ("blue", True)
    near = album.indexer.search("blue", score_threshold=0.999)
    assert {Path(hit.path).name for hit in near} == ({"blue.png", "red.png"} if embed == BOTH else {"blue.png"})
    red = str(album.folder / "red.png")
    assert len(album.indexer.search(image=red, any_orientation=True)) == 4
    assert len(album.indexer.search(like=red)) == 3, "not the image itself"


@pytest.mark.parametrize("album", ["client"], indirect=True)
def test_scores_of_two_vectors_are_those_of_rank_fusion(album: Album, embed: str) -> None:
    album.describe(red="blue", green="red", blue="green", yellow="yellow")
    album.run()
    scores = {Path(hit.path).name: hit.score for hit in album.indexer.search("yellow", limit=4)}
    if embed == BOTH:
        assert scores["yellow.png"] == pytest.approx(1 / 2 + 1 / 2), "the first of both"
        assert max(scores.values()) == scores["yellow.png"]
    else:
        assert scores["yellow.png"] == pytest.approx(1, abs=1e-6), "the cosine"


def keep_vectors(handler: Handler) -> bool:
    """Store the vectors of a batch, not the payloads, and close the connection: a process was killed in between."""
    operations = handler.body["operations"]
    handler.body["operations"] = [each for each in operations if "overwrite_payload" not in each]
    assert 0 < len(handler.body["operations"]) < len(operations)
    handler.work()
    return drop(handler)


@pytest.mark.parametrize("album", ["url"], indirect=True)
def test_a_run_that_was_killed_between_vector_and_payload_is_completed(
    album: Album, embed: str, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocoa_embed.integrations.qdrant.stores.server.ATTEMPTS", 1)
    album.run()
    album.describe(red="green", green="red")
    server.fail("points/batch", keep_vectors)
    with pytest.raises(CocoaError, match="failed"):
        album.run()
    with pytest.raises(AssertionError, match="Mismatched"):
        album.captions(embed)
    assert album.run().updated == 2
    assert {"red.png": "green", "green.png": "red"}.items() <= album.captions(embed).items()


def test_a_caption_that_is_not_embedded_is_not_stored_either(embed: str) -> None:
    """As when another process has removed a caption at the same time."""
    record = Record("/a.png", "a.png", bytes, 1.0, metadata={"text": "new"}, metadata_source="/metadata.jsonl")
    stored = {"paths": ["/a.png"], "relative_paths": ["a.png"], "mtimes": [1.0], "caption": "old", "sha256": "0"}
    change, merger = Change(), Merger(lambda _: False)
    change.hold(record)
    assert merger.changes_caption(stored, record)
    for vectors, caption in ({}, "old"), ({"other": None}, "old"), ({"new": NewVector("", np.ones(2))}, "new"):
        change.vectors = vectors
        payload, vector = merger.apply_with_vector(embed, stored, change)
        assert payload is not None
        assert (payload["caption"], vector) == (caption, vectors.get(caption))
    assert merger.apply_with_vector(IMAGE, stored, Change(held={"/a.png": record}))[1] is None


@pytest.mark.parametrize("album", ["client", "edge"], indirect=True)
def test_embeddings_in_files_are_loaded_with_their_captions(album: Album, embed: str, tmp_path: Path) -> None:
    for step, captions in ("one", {"red": "a red thing", "green": "blue"}), ("two", {"red": "yellow", "blue": "sky"}):
        folder = EmbeddingFolder(str(tmp_path / step), embed)
        album.describe(**captions)
        list(embed_parts(plan(all_sources([album.folder]), folder), folder, Encoder(album.model)))
        load(folder, album.indexer.store)
        assert {f"{name}.png": text for name, text in captions.items()}.items() <= album.captions(embed).items()
    assert album.run().updated == 1, "only a run over the images knows that green has no caption any more"
    assert album.captions(embed)["green.png"] is None
    with pytest.raises(CocoaError, match=f"was made with --embed {embed.replace('+', '.')}, not with --embed image"):
        folder.sign(replace(album.indexer.store.require_signature(), embed=IMAGE))


def test_another_setting_is_refused_and_the_default_is_the_collections(tmp_path: Path, embed: str) -> None:
    client = QdrantClient(":memory:")
    album = Album(tmp_path / "photos", client=client, embed=embed)
    album.run()
    other = QdrantIndexer(album.model, client=client, embed=BOTH if embed == TOGETHER else TOGETHER)
    for use in (lambda: other.index(album.folder), lambda: other.search("red"), other.require_model):
        with pytest.raises(CocoaError, match=r"was made with --embed .*, not with --embed .*; leave --embed out"):
            use()
    same = QdrantIndexer(album.model, client=client)
    assert same.index(album.folder, progress=False).unchanged == 4
    assert same.store.require_signature().embed == embed
    with pytest.raises(UsageError, match=r"embed is 'caption'; it can be image, image.caption, both"):
        QdrantIndexer(album.model, client=client, embed="caption")


def test_a_caption_that_a_model_refuses_is_reported_in_one_sentence(tmp_path: Path) -> None:
    album = Album(tmp_path / "photos", client=QdrantClient(":memory:"), embed=BOTH)
    album.describe(red="<|image_pad|>")
    with pytest.raises(CocoaError, match=r"does not accept the caption of .*red\.png, or of one of 0 images"):
        album.run()


def test_a_caption_that_is_refused_with_its_image_costs_no_point_and_is_tried_again_when_corrected(
    tmp_path: Path,
) -> None:
    album = Album(tmp_path / "photos", client=QdrantClient(":memory:"), embed=TOGETHER)
    album.describe(red="<|image_pad|>")
    summary = album.run()
    assert (summary.indexed, [failure["path"] for failure in summary.failed]) == (3, [str(album.folder / "red.png")])
    assert (len(album.run().failed), album.embedded) == (1, []), "the same caption is not tried again"
    album.describe(red="a red thing")
    assert (album.run().indexed, album.embedded) == (1, [("image", "text")])
    for caption in ("<|image_pad|>", "<|image_pad|> again"):
        album.describe(red=caption)
        assert [len(album.run().failed), len(album.run().failed)] == [1, 1]
        assert album.captions(TOGETHER)["red.png"] == "a red thing"
    album.describe(red="a red thing")
    assert (album.run().unchanged, album.run().failed) == (4, [])


def test_a_model_that_takes_no_image_with_a_text_embeds_them_apart(tmp_path: Path) -> None:
    model = FakeModel()
    model.supports = lambda modality: isinstance(modality, str)
    with pytest.raises(CocoaError, match="does not embed an image together with a text; use --embed both"):
        QdrantIndexer(model, client=QdrantClient(":memory:"), embed=TOGETHER).index(write_colours(tmp_path, "red"))
    assert QdrantIndexer(model, client=QdrantClient(":memory:"), embed=BOTH).index(tmp_path).indexed == 1
