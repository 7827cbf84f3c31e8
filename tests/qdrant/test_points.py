import json
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import MetadataMode
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from cocoa_embed.integrations.qdrant.points import (
    FileLocation,
    ImageFile,
    make_payload,
    plain_payload,
    point_id,
    stored_locations,
)

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
    return make_payload(**{"content": CONTENT, "locations": [ZEBRA], "description": DESCRIPTION, **changes})


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
    stored = make_payload(before, **{"description": {}, **changes})
    assert stored == payload(**changes) != before
    assert before == kept
    again = node_to_metadata_dict(metadata_dict_to_node(stored), remove_text=False, flat_metadata=False)
    assert json.loads(again.pop("_node_content")) == json.loads(stored.pop("_node_content"))
    assert again == stored


def test_a_description_and_a_location_are_valid_json() -> None:
    metadata = {"n\udcff": ["\udcfe", 1, None, 1.5, True]}
    file = ImageFile(Path("/z\udcff.jpg"), "z\udcff.jpg", "n\udcff", metadata, "/metadata.jsonl")
    stored = payload(locations=[file.location(1.0)], description=file.description)
    json.dumps(stored, ensure_ascii=False, allow_nan=False).encode("utf-8")
    assert (stored["path"], stored["relative_path"]) == (r"/z\udcff.jpg", r"z\udcff.jpg")
    assert file.description == {key: stored[key] for key in ("caption", "metadata", "caption_source")}
    assert stored["caption"] == r"n\udcff"
    assert stored["metadata"] == {r"n\udcff": [r"\udcfe", 1, None, 1.5, True]}
