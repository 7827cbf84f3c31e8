import json
from typing import Any

import pytest
from llama_index.core.schema import MetadataMode
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from cocoa_embed.integrations.qdrant.points import (
    FileLocation,
    describe,
    location_of,
    make_payload,
    plain_payload,
    point_id,
    stored_locations,
    with_node_fields,
)
from cocoa_embed.sources.base import Record

SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
CONTENT = {"sha256": SHA256, "bytes": 1234, "width": 640, "height": 480, "mime": "image/jpeg"}
ZEBRA = FileLocation("/data/zoo/zebra ünï.jpg", "zebra ünï.jpg", 1_700_000_000.25)
AGAIN = FileLocation("/data/again.jpg", "again.jpg", 1_700_000_001.5)
DESCRIPTION = {
    "caption": "a zebra at dusk",
    "metadata": {"licence": "CC0", "tags": ["striped"]},
    "caption_source": "/data/metadata.jsonl",
}
NONE = {"caption": None, "metadata": {}, "caption_source": None}
CHANGES: list[dict[str, Any]] = [
    {"locations": [AGAIN]},
    {"locations": [AGAIN, ZEBRA], "description": {**NONE, "caption": "two zebras"}},
    {"locations": [ZEBRA], "description": NONE},
    {"locations": [ZEBRA, AGAIN], "thumbnail": "/t/1.jpg"},
]


def payload(**changes: Any) -> dict[str, Any]:
    arguments = {"content": CONTENT, "locations": [ZEBRA], "description": DESCRIPTION, "llama_index": True}
    return make_payload(**{**arguments, **changes})


def test_the_id_depends_on_the_content_alone_and_never_changes() -> None:
    assert point_id(SHA256) == "8c851bc5-da8d-5324-9942-0f435ca54c9e"


def test_the_payload_has_plain_fields_and_no_image() -> None:
    stored = payload(locations=[ZEBRA, AGAIN])
    lists = {f"{field}s": [getattr(ZEBRA, field), getattr(AGAIN, field)] for field in FileLocation._fields}
    assert plain_payload(stored) == {**ZEBRA._asdict(), **lists, **CONTENT, **DESCRIPTION}
    assert json.loads(stored["_node_content"])["image"] is None
    assert metadata_dict_to_node(stored).get_content(MetadataMode.EMBED) == "a zebra at dusk"
    assert stored_locations(json.loads(json.dumps(stored))) == [ZEBRA, AGAIN]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_changed_payload_is_what_llama_index_itself_would_write(changes: dict[str, Any]) -> None:
    before = payload()
    kept = dict(before)
    stored = make_payload(before, **{"description": {}, **changes})  # keeps the node of the stored payload
    assert stored == payload(**changes) != before
    assert before == kept
    again = node_to_metadata_dict(metadata_dict_to_node(stored), remove_text=False, flat_metadata=False)
    assert json.loads(again.pop("_node_content")) == json.loads(stored.pop("_node_content"))
    assert again == stored


def test_without_llama_index_a_payload_has_at_most_600_bytes() -> None:
    slim = payload(description=NONE, llama_index=False)
    assert len(json.dumps(slim)) < 600 < 2000 < len(json.dumps(payload(description=NONE)))
    assert slim == plain_payload(payload(description=NONE))
    assert make_payload(slim, [AGAIN], {}).keys() == slim.keys()
    assert with_node_fields({**slim, "revision": 3})["_node_content"] == payload(description=NONE)["_node_content"]


def test_the_place_in_a_shard_is_that_of_the_first_file_that_is_in_one() -> None:
    page = FileLocation("/data/report.pdf#page=3", "report.pdf#page=3", 1.0)
    frame = FileLocation("/data/clip.mp4#t=12.5", "clip.mp4#t=12.5", 2.0)
    misleading = FileLocation("/data/C#page=3", "C#page=3", 3.0)
    shards = ["/data/report.pdf", "/data/clip.mp4"]

    def place(stored: dict[str, Any]) -> dict[str, Any]:
        return {key: stored[key] for key in ("shard", "page", "seconds") if key in stored}

    both = payload(locations=[page, frame], shards=shards)
    assert place(both) == {"shard": shards, "page": 3}
    assert place(make_payload(both, [frame], {})) == {"shard": shards[1], "seconds": 12.5}
    assert place(make_payload(both, [misleading, page], {})) == {"shard": shards[0]}
    assert place(make_payload(both, [misleading], {})) == {}


def test_a_description_and_a_location_are_valid_json() -> None:
    metadata: dict[str, Any] = {"n\udcff": ["\udcfe", 1, None, 1.5, True, 2**63 - 1]}
    metadata["text"] = "n\udcff"
    record = Record("/z\udcff.jpg", "z\udcff.jpg", bytes, 1.0, 5, None, metadata, "/metadata.jsonl")
    stored = payload(locations=[location_of(record)], description=describe(record))
    json.dumps(stored, ensure_ascii=False, allow_nan=False).encode("utf-8")
    assert (stored["path"], stored["relative_path"]) == (r"/z\udcff.jpg", r"z\udcff.jpg")
    assert describe(record) == {key: stored[key] for key in ("caption", "metadata", "caption_source")}
    assert stored["caption"] == r"n\udcff"
    assert stored["metadata"] == {r"n\udcff": [r"\udcfe", 1, None, 1.5, True, 2**63 - 1]}
