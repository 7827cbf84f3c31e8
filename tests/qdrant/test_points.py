import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cocoa_embed.integrations.qdrant.points import (
    NO_WORDS,
    Description,
    ImageRecord,
    Place,
    changed_payload,
    payload,
    plain_payload,
    point_id,
    storable,
    stored_places,
)

SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

ZEBRA = Place("/data/zoo/zebra ünï.jpg", "zebra ünï.jpg", 1_700_000_000.25)
AGAIN = Place("/data/again.jpg", "again.jpg", 1_700_000_001.5)
WORDS = {"caption": "a zebra at dusk", "metadata": {"licence": "CC0", "tags": ["striped"]}}


def record(**changes: Any) -> ImageRecord:
    whole = ImageRecord(
        places=[ZEBRA], words=WORDS, sha256=SHA256, bytes=1234, width=640, height=480, mime="image/jpeg"
    )
    return replace(whole, **changes)


def test_the_id_depends_on_the_content_alone_and_never_changes() -> None:
    assert point_id(SHA256) == "8c851bc5-da8d-5324-9942-0f435ca54c9e"
    assert point_id(SHA256.upper()) == point_id(SHA256)
    assert point_id(SHA256[::-1]) != point_id(SHA256)


@pytest.mark.parametrize("wrong", ["", SHA256[:-1], "zz" * 32])
def test_what_is_no_sha256_has_no_id(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"64 hexadecimal digits|non-hexadecimal"):
        point_id(wrong)


def test_the_payload_holds_the_record_and_no_image() -> None:
    stored = payload(record())
    assert plain_payload(stored) == {
        "path": "/data/zoo/zebra ünï.jpg",
        "relative_path": "zebra ünï.jpg",
        "mtime": 1_700_000_000.25,
        "paths": ["/data/zoo/zebra ünï.jpg"],
        "relative_paths": ["zebra ünï.jpg"],
        "mtimes": [1_700_000_000.25],
        "sha256": SHA256,
        "bytes": 1234,
        "width": 640,
        "height": 480,
        "mime": "image/jpeg",
        "caption": "a zebra at dusk",
        "metadata": {"licence": "CC0", "tags": ["striped"]},
    }
    assert json.loads(stored["_node_content"])["image"] is None


@pytest.mark.parametrize("changes", [{}, {"words": NO_WORDS}, {"places": [ZEBRA, AGAIN], "thumbnail": "/t/1.jpg"}])
def test_the_payload_is_what_llama_index_itself_would_write(changes: dict[str, object]) -> None:
    utils = pytest.importorskip("llama_index.core.vector_stores.utils")
    schema = pytest.importorskip("llama_index.core.schema")
    stored = payload(record(**changes))
    node = utils.metadata_dict_to_node(stored)
    assert isinstance(node, schema.ImageNode)
    again = utils.node_to_metadata_dict(node, remove_text=False, flat_metadata=False)
    assert json.loads(again.pop("_node_content")) == json.loads(stored.pop("_node_content"))
    assert again == stored


def test_llama_index_shows_a_language_model_the_caption_and_where_the_image_is_from() -> None:
    utils = pytest.importorskip("llama_index.core.vector_stores.utils")
    schema = pytest.importorskip("llama_index.core.schema")
    node = utils.metadata_dict_to_node(payload(record()))
    assert node.node_id == node.ref_doc_id == point_id(SHA256)
    assert (node.image_path, node.image_mimetype) == ("/data/zoo/zebra ünï.jpg", "image/jpeg")
    assert node.get_content(schema.MetadataMode.EMBED) == "a zebra at dusk"
    shown = node.get_content(schema.MetadataMode.LLM)
    assert "relative_path: zebra ünï.jpg" in shown
    assert "CC0" in shown
    assert shown.count("a zebra at dusk") == 1
    assert SHA256 not in shown


def test_files_of_the_same_content_stand_side_by_side_and_come_back() -> None:
    stored = payload(record(places=[ZEBRA, AGAIN]))
    assert (stored["path"], stored["mtime"]) == (ZEBRA.path, ZEBRA.mtime)
    assert stored["paths"] == [ZEBRA.path, AGAIN.path]
    assert stored_places(json.loads(json.dumps(stored))) == [ZEBRA, AGAIN]


@pytest.mark.parametrize("foreign", [{}, {"paths": None}, {"path": "/a.jpg"}, {"paths": ["/a.jpg"]}])
def test_a_payload_that_others_wrote_names_no_files(foreign: dict[str, Any]) -> None:
    assert stored_places(foreign) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"places": [AGAIN]},
        {"places": [AGAIN, ZEBRA], "words": {"caption": "two zebras", "metadata": {}}},
        {"places": [ZEBRA], "words": NO_WORDS},
        {"places": [ZEBRA], "thumbnail": "/t/1.jpg"},
    ],
)
def test_a_changed_payload_is_that_of_a_record_changed_likewise(changes: dict[str, Any]) -> None:
    before = payload(record())
    kept = dict(before)
    after = changed_payload(before, **changes)
    assert after == payload(record(**changes)) != before
    assert before == kept
    node = json.loads(after["_node_content"])
    assert (node["image_path"], node["text"]) == (after["path"], after["caption"] or "")


def test_a_payload_holds_the_words_that_its_description_is_compared_by() -> None:
    described = Description(Path("/z.jpg"), "z.jpg", "n\udcff", {"n\udcff": 1}, "/metadata.jsonl")
    stored = payload(record(words=described.words))
    assert described.words == {key: stored[key] for key in ("caption", "metadata", "words_from")}
    assert described.words["caption"] == r"n\udcff"


def test_undecodable_bytes_become_valid_unicode() -> None:
    words = storable({"caption": None, "metadata": {"n\udcff": ["\udcfe", 1, None]}})
    stored = payload(record(places=[ZEBRA._replace(path=storable("/data/\udcff.jpg"))], words=words))
    json.dumps(stored, ensure_ascii=False).encode("utf-8")
    assert stored["path"] == r"/data/\udcff.jpg"
    assert stored["metadata"] == {r"n\udcff": [r"\udcfe", 1, None]}
    assert storable("ünï 🦓") == "ünï 🦓"


def test_numbers_that_json_does_not_have_become_null() -> None:
    assert storable({"a": [1e999, -1e999, float("nan"), 1.5, 7, True]}) == {"a": [None, None, None, 1.5, 7, True]}
