"""The API's searches, and what is wrong with a request."""

from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, colour_image
from served import message, served, uri
from starlette.testclient import TestClient

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.integrations.qdrant import QdrantIndexer


def names(response: Any) -> list[str]:  # noqa: ANN401
    assert response.status_code == 200, response.text
    return [Path(hit["path"]).stem for hit in response.json()["hits"]]


def test_hits_are_those_of_the_indexer(colours: Path, index: dict[str, Any]) -> None:
    red, blue = ([str(colours / f"{name}.png")] for name in ("red", "blue"))
    queries: list[dict[str, Any]] = [{"text": "red"}, {"like": blue}, {"text": "green", "unlike": red}]
    with QdrantIndexer(Encoder(FakeModel(), "fake"), **index) as indexer:
        expected = [indexer.search(**query, limit=3, offset=1) for query in queries]
    with served(index) as client:
        for query, hits in zip(queries, expected, strict=True):
            answer = client.post("/search", json={**query, "limit": 3, "offset": 1}).json()
            assert [(hit["id"], hit["path"]) for hit in answer["hits"]] == [(hit.id, hit.path) for hit in hits]
            assert [hit["score"] for hit in answer["hits"]] == pytest.approx([hit.score for hit in hits])
            assert answer["seconds"] > 0


def test_a_hit_has_caption_size_and_payload(api: TestClient, colours: Path) -> None:
    (hit,) = api.post("/search", json={"text": "red", "limit": 1}).json()["hits"]
    assert (hit["path"], hit["caption"], hit["width"], hit["height"]) == (str(colours / "red.png"), "all red", 24, 16)
    assert hit["payload"]["metadata"] == {"shop": "r"}


def test_a_form_and_json_ask_the_same(api: TestClient, colours: Path) -> None:
    blue = colours / "blue.png"
    file = {"image": ("any/../name.txt", blue.read_bytes(), "text/plain")}
    as_form = api.post("/search", files=file, data={"text": "red", "limit": "3", "filters": ["width>9", "mime=png"]})
    query = {"text": "red", "image": uri(blue), "limit": 3, "filters": ["width>9", "mime=png"]}
    assert names(as_form) == names(api.post("/search", json=query))
    assert set(names(as_form)[:2]) == {"red", "blue"}
    assert names(api.post("/search", data={"text": "red", "limit": 1})) == ["red"]
    assert names(api.post("/search", data={"text": "red", "filters": ["shop=b"]})) == ["blue"]
    no_file_chosen = api.post("/search", files={"image": ("", b"")}, data={"text": "green", "limit": "1"})
    assert names(no_file_chosen) == ["green"]


def test_like_takes_the_id_of_a_point_and_leaves_it_out(api: TestClient) -> None:
    (red,) = api.post("/search", json={"text": "red", "limit": 1}).json()["hits"]
    assert sorted(names(api.post("/search", json={"like": red["id"]}))) == ["blue", "green", "yellow"]


PICTURE = "is not an image that can be read"
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"json": {}}, "400 there is nothing to search for"),
    ({"json": {"text": "  "}}, "400 there is nothing to search for"),
    ({"json": {"text": "red", "limit": "many"}}, "400 limit: Input should be a valid integer"),
    ({"json": {"text": "red", "limit": 10**9}}, "400 limit: "),
    ({"json": {"text": "red", "colour": "red"}}, "400 colour: Extra inputs are not permitted"),
    ({"json": {"text": ["red"]}}, "400 text: "),
    ({"json": {"text": "red", "filters": ["width>>9"]}}, "400 'width>>9' is not a filter"),
    ({"json": {"text": "red", "filters": ["widht>9"]}}, "400 nothing was found: no image in"),
    ({"json": {"like": "00000000-0000-0000-0000-000000000000"}}, "404 collection 'images' in"),
    ({"json": {"image": "/etc/hostname"}}, "400 the image is neither an uploaded file nor a data: URI"),
    ({"json": {"image": "http://127.0.0.1/a.png"}}, "400 the image is neither"),
    ({"json": {"image": "data:image/png;base64,A?AA"}}, "422 data: URI of 26 characters: is not valid base64"),
    ({"json": {"image": "data:image/png;base64,AAAA"}}, f"422 data: URI of 26 characters: {PICTURE}"),
    ({"files": {"image": ("a.png", b"GIF89a")}}, "422 a.png: "),
    ({"files": {"image": ("b.png", b"")}}, "422 b.png: is empty"),
    ({"content": b'{"text": "red', "headers": {"content-type": "application/json"}}, "400 the body is not JSON"),
    ({"content": b"[" * 99_999, "headers": {"content-type": "application/json"}}, "400 the body is not JSON"),
    ({"content": b'{"text": "\\ud800"}', "headers": {"content-type": "application/json"}}, "400 the text"),
    ({"json": ["red"]}, "400 the body is a JSON list; send an object"),
    (
        {"content": b"red", "headers": {"content-type": "text/plain"}},
        "415 the body is text/plain; send application/json",
    ),
    ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=y"}}, "400 "),
    ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, "400 Missing boundary in multipart."),
    ({"data": {"text": ["red", "blue"]}}, "400 text is given twice"),
    ({"data": {"filters": ["width>9"] * 200}}, "400 "),
]


def test_an_invalid_request_is_explained_as_json(api: TestClient) -> None:
    for asked, words in FAULTS:
        assert message(api.post("/search", **asked)).startswith(words), words


def test_a_picture_that_the_model_refuses_is_the_fault_of_the_request(api: TestClient, tmp_path: Path) -> None:
    colour_image("red", (2000, 4)).save(tmp_path / "long.png")
    answer = message(api.post("/search", json={"image": uri(tmp_path / "long.png")}))
    assert answer == "400 fake does not accept the input (absolute aspect ratio must be smaller than 200)"


def test_info_describes_the_collection_and_its_facets(api: TestClient) -> None:
    info = api.get("/info").json()
    assert (info["collection"], info["model"], info["points"]) == ("images", "fake", 4)
    facets = {facet.pop("key"): facet for facet in info["facets"]}
    assert facets["mime"] == {"kind": "keyword", "values": [["image/png", 4]]}
    assert facets["width"] == {"kind": "number", "min": 24, "max": 24}
    assert facets["shop"] == {"kind": "keyword", "values": [["r", 1], ["b", 1]]}
    assert facets["caption"] == {"kind": "text"}
    assert not facets.keys() & {"path", "paths", "sha256", "metadata"}


def test_a_store_that_fails_is_not_the_fault_of_the_request(api: TestClient, storage: dict[str, Any]) -> None:
    for file in storage["path"].iterdir():
        if file.name == "meta.json":
            file.unlink()
    assert message(api.post("/search", json={"text": "red"})).startswith("503 there is no collection 'images'")
    assert api.get("/health").json() == {"status": "ok"}
