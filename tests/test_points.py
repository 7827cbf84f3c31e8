import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cocoa_embed.integrations.points import (
    Description,
    ImageRecord,
    described_payload,
    payload,
    plain_payload,
    point_id,
    storable,
)

SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


ZEBRA = Description(
    Path("/data/zoo/zebra ünï.jpg"), "zebra ünï.jpg", "a zebra at dusk", {"licence": "CC0", "tags": ["striped"]}
)


def record(**changes: Any) -> ImageRecord:
    return ImageRecord(
        description=replace(ZEBRA, **changes), sha256=SHA256, bytes=1234, width=640, height=480, mime="image/jpeg"
    )


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
        "sha256": SHA256,
        "bytes": 1234,
        "width": 640,
        "height": 480,
        "mime": "image/jpeg",
        "caption": "a zebra at dusk",
        "metadata": {"licence": "CC0", "tags": ["striped"]},
    }
    assert json.loads(stored["_node_content"])["image"] is None


@pytest.mark.parametrize("changes", [{}, {"caption": None, "metadata": {}}])
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


def test_a_description_without_words_changes_the_paths_and_nothing_else() -> None:
    moved = Description(Path("/new/z.jpg"), "z.jpg")
    assert not moved.has_words
    assert described_payload(payload(record()), moved) == payload(
        record(path=Path("/new/z.jpg"), relative_path="z.jpg")
    )


def test_a_description_with_words_changes_caption_metadata_and_node() -> None:
    described = replace(ZEBRA, caption="two zebras", metadata={"licence": "MIT"})
    before = payload(record())
    after = described_payload(before, described)
    assert after == payload(record(caption="two zebras", metadata={"licence": "MIT"}))
    assert (after["caption"], after["metadata"]) == ("two zebras", {"licence": "MIT"})
    assert json.loads(before["_node_content"])["text"] == "a zebra at dusk"
    node = json.loads(after["_node_content"])
    assert node["text"] == node["metadata"]["caption"] == "two zebras"
    assert node["metadata"]["metadata"] == {"licence": "MIT"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caption": "two zebras", "metadata": {}}, {"caption": "two zebras", "metadata": {}}),
        ({"caption": "", "metadata": {}}, {"caption": "", "metadata": {}}),
        ({"caption": None, "metadata": {"licence": "MIT"}}, {"caption": None, "metadata": {"licence": "MIT"}}),
    ],
)
def test_words_are_a_caption_or_metadata_and_replace_both(changes: dict[str, Any], words: dict[str, Any]) -> None:
    described = replace(ZEBRA, **changes)
    assert described.has_words
    assert described.words == words
    after = described_payload(payload(record()), described)
    assert {key: after[key] for key in words} == words


def test_a_payload_holds_the_words_that_its_description_is_compared_by() -> None:
    described = replace(ZEBRA, caption="n\udcff", metadata={"n\udcff": 1})
    stored = payload(record(caption="n\udcff", metadata={"n\udcff": 1}))
    assert described.words == {"caption": stored["caption"], "metadata": stored["metadata"]}
    assert described.words["caption"] == r"n\udcff"


def test_undecodable_names_become_valid_unicode() -> None:
    stored = payload(record(path=Path("/data/\udcff.jpg"), metadata={"n\udcff": ["\udcfe", 1, None]}))
    json.dumps(stored, ensure_ascii=False).encode("utf-8")
    assert stored["path"] == r"/data/\udcff.jpg"
    assert stored["metadata"] == {r"n\udcff": [r"\udcfe", 1, None]}
    assert storable("ünï 🦓") == "ünï 🦓"
