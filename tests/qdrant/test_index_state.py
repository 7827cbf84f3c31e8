from typing import Any

import pytest

from cocoa_embed.integrations.qdrant.index_state import IndexState
from cocoa_embed.integrations.qdrant.points import FileLocation, make_payload, point_id

SHA_A, SHA_B = "a" * 64, "b" * 64
A, B = point_id(SHA_A), point_id(SHA_B)
RED, BLUE = FileLocation("/p/red.png", "red.png", 10.5), FileLocation("/p/blue.png", "blue.png", 20.25)
NONE = {"caption": None, "metadata": {}, "caption_source": None}


def stored(sha256: str, *locations: FileLocation) -> tuple[str, dict[str, Any]]:
    content = {"sha256": sha256, "bytes": 99, "width": 1, "height": 1, "mime": "image/png"}
    return point_id(sha256), make_payload(content, locations, NONE)


def changed(state: IndexState) -> dict[str, list[str]]:
    return {id_: list(content.locations) for id_, content in state.changed().items()}


def test_a_file_with_the_stored_mtime_and_size_is_unchanged_and_foreign_points_are_skipped() -> None:
    foreign = [("7", {}), ("8", {"path": "/p/red.png"}), ("9", {"_node_content": "{}"})]
    state = IndexState.read([*foreign, stored(SHA_A, RED, BLUE)])
    assert list(state.contents) == [A]
    assert A in state
    assert state.unchanged_id(RED.path, RED.mtime, 99) == state.id_of(RED.path) == A
    assert state.unchanged_id(BLUE.path, BLUE.mtime + 1e-7, 99) == A
    for path, mtime, size in ((RED.path, RED.mtime, 98), (RED.path, BLUE.mtime, 99), ("/p/new.png", RED.mtime, 99)):
        assert state.unchanged_id(path, mtime, size) is None
    assert not changed(state)


@pytest.mark.parametrize("holds", [A, B])
def test_a_file_that_two_contents_name_is_read_again_and_settled(holds: str) -> None:
    state = IndexState.read([stored(SHA_A, RED), stored(SHA_B, RED)])
    assert state.unchanged_id(RED.path, RED.mtime, 99) is None
    state.attach(holds, RED)
    assert state.unchanged_id(RED.path, RED.mtime, 99) == holds
    assert changed(state) == {B if holds == A else A: []}
