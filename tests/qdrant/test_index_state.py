from typing import Any

import pytest

from cocoa_embed.integrations.qdrant.index_state import Content, Ledger, words_digest
from cocoa_embed.integrations.qdrant.points import ImageRecord, Place, payload, point_id

SHA_A, SHA_B = "a" * 64, "b" * 64
A, B = point_id(SHA_A), point_id(SHA_B)
RED, BLUE = Place("/p/red.png", "red.png", 10.5), Place("/p/blue.png", "blue.png", 20.25)
WORDS = {"caption": None, "metadata": {}}


def stored(sha256: str, *places: Place, words: dict[str, Any] = WORDS) -> tuple[str, dict[str, Any]]:
    record = ImageRecord(places=places, words=words, sha256=sha256, bytes=99, width=1, height=1, mime="image/png")
    return point_id(sha256), payload(record)


def changed(ledger: Ledger) -> dict[str, list[str]]:
    return {id_: [place.path for place in content.places] for id_, content in ledger.changes()}


def test_a_file_of_the_stored_time_and_size_is_unchanged() -> None:
    ledger = Ledger.read([stored(SHA_A, RED, BLUE)])
    assert ledger.is_unchanged(RED.path, RED.mtime, 99)
    assert ledger.is_unchanged(BLUE.path, BLUE.mtime + 1e-7, 99)
    assert not ledger.is_unchanged(RED.path, RED.mtime, 98)
    assert not ledger.is_unchanged(RED.path, BLUE.mtime, 99)
    assert not ledger.is_unchanged("/p/new.png", RED.mtime, 99)
    assert ledger.owner(RED.path) == A
    assert A in ledger
    assert not changed(ledger)


@pytest.mark.parametrize("foreign", [{}, {"path": "/p/red.png"}, {"_node_content": "{}"}])
def test_points_of_others_are_passed_over(foreign: dict[str, Any]) -> None:
    ledger = Ledger.read([("7", foreign), stored(SHA_A, RED)])
    assert list(ledger.contents) == [A]


def test_a_file_that_takes_another_content_leaves_the_old_one() -> None:
    ledger = Ledger.read([stored(SHA_A, RED), stored(SHA_B, BLUE)])
    ledger.hold(B, RED._replace(mtime=30.0))
    assert changed(ledger) == {A: [], B: [BLUE.path, RED.path]}
    assert ledger.owner(RED.path) == B
    assert ledger.is_unchanged(RED.path, 30.0, 99)


def test_new_content_is_taken_from_the_content_that_its_file_held() -> None:
    ledger = Ledger.read([stored(SHA_A, RED, BLUE)])
    ledger.add(B, Content(50, [RED], words_digest(WORDS), is_new=True))
    assert changed(ledger) == {A: [BLUE.path]}
    assert ledger.is_unchanged(RED.path, RED.mtime, 50)


def test_a_file_that_is_touched_keeps_its_content_at_its_new_time() -> None:
    ledger = Ledger.read([stored(SHA_A, RED, BLUE)])
    ledger.hold(A, RED)
    assert not changed(ledger)
    ledger.hold(A, RED._replace(mtime=11.5))
    assert changed(ledger) == {A: [RED.path, BLUE.path]}
    assert ledger.is_unchanged(RED.path, 11.5, 99)


@pytest.mark.parametrize("holds", [A, B])
def test_a_file_that_two_contents_name_is_read_again_and_settled(holds: str) -> None:
    ledger = Ledger.read([stored(SHA_A, RED), stored(SHA_B, RED)])
    assert not ledger.is_unchanged(RED.path, RED.mtime, 99)
    ledger.hold(holds, RED)
    assert ledger.is_unchanged(RED.path, RED.mtime, 99)
    assert changed(ledger) == {B if holds == A else A: []}


def test_files_that_are_gone_are_forgotten_and_counted() -> None:
    ledger = Ledger.read([stored(SHA_A, RED, BLUE)])
    assert ledger.forget(A, lambda path: False) == 0
    assert not changed(ledger)
    assert ledger.forget(A, lambda path: path == RED.path) == 1
    assert changed(ledger) == {A: [BLUE.path]}
    assert ledger.owner(RED.path) is None
    assert ledger.forget(A, lambda path: True) == 1
    assert changed(ledger) == {A: []}


def test_a_payload_whose_lists_do_not_fit_is_read_as_far_as_they_do() -> None:
    id_, broken = stored(SHA_A, RED, BLUE)
    broken["mtimes"] = broken["mtimes"][:1]
    ledger = Ledger.read([(id_, broken)])
    assert ledger.owner(RED.path) == A
    assert ledger.owner(BLUE.path) is None
    ledger.hold(A, BLUE)
    assert changed(ledger) == {A: [RED.path, BLUE.path]}


def test_words_are_told_apart_by_type_and_not_by_order() -> None:
    assert words_digest({"caption": "a", "metadata": {"x": 1, "y": 2}}) == words_digest(
        {"metadata": {"y": 2, "x": 1}, "caption": "a"}
    )
    assert words_digest({"caption": None, "metadata": {"x": 1}}) != words_digest(
        {"caption": None, "metadata": {"x": True}}
    )
