import os
from pathlib import Path

import pytest
from exported import contents

from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import claim_folder, is_scratch_of, write_atomically

MARKER = "marker.json"


def earlier_run(folder: Path) -> Path:
    (folder / "stage").mkdir(parents=True)
    (folder / "stage" / "weights").write_bytes(b"old")
    (folder / MARKER).write_text("{}")
    return folder


def assert_claimed(folder: Path) -> None:
    assert contents(folder) == {MARKER: b""}, "it is empty but for the marker of the run that has begun"
    assert [path.name for path in folder.iterdir()] == [MARKER]


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    claim_folder(tmp_path / "some" / "where", marker=MARKER)
    assert_claimed(tmp_path / "some" / "where")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert not any(tmp_path.iterdir())
    claim_folder(tmp_path, marker=MARKER)
    assert_claimed(tmp_path)


def test_what_an_earlier_run_left_is_removed(tmp_path: Path) -> None:
    claim_folder(earlier_run(tmp_path / "run"), marker=MARKER)
    assert_claimed(tmp_path / "run")


def test_a_run_that_was_cut_short_can_be_run_again(tmp_path: Path) -> None:
    claim_folder(tmp_path / "run", marker=MARKER)
    (tmp_path / "run" / "half.txt").write_text("half")
    claim_folder(tmp_path / "run", marker=MARKER)
    assert_claimed(tmp_path / "run")


@pytest.mark.parametrize("other", ["thesis.txt", ".hidden", "stage/marker.json"])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path: Path, other: str) -> None:
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(CocoaError, match=r"holds something else \(it has no marker\.json\); nothing was written"):
        claim_folder(tmp_path, marker=MARKER)
    assert contents(tmp_path) == before == {other: b"mine"}


def test_a_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CocoaError, match=r"out is a file; give the name of a folder"):
        claim_folder(tmp_path / "out", marker=MARKER)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CocoaError, match="notes"):
        claim_folder(tmp_path / "notes" / "out", marker=MARKER)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_link_to_an_earlier_run_is_claimed_or_refused_in_a_sentence(tmp_path: Path) -> None:
    """People link their output to a larger disk."""
    run = earlier_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run, target_is_directory=True)
    try:
        claim_folder(tmp_path / "link", marker=MARKER)
    except CocoaError:
        assert (run / "stage" / "weights").exists()
    else:
        assert_claimed(tmp_path / "link")


def test_what_could_not_be_put_in_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_each_process_has_a_scratch_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kill(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr("cocoa_embed.folders.os.replace", kill)
        for process in (7, 8):
            patch.setattr("cocoa_embed.folders.os.getpid", lambda process=process: process)
            with pytest.raises(Kill):
                write_atomically(tmp_path / "a.json", "text")
    assert contents(tmp_path) == {"a.json.7.new": b"text", "a.json.8.new": b"text"}
    assert all(is_scratch_of(name, "a.json") for name in os.listdir(tmp_path))
    assert not is_scratch_of("a.json", "a.json")
    write_atomically(tmp_path / "a.json", "other")
    assert (tmp_path / "a.json").read_text() == "other"
