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


@pytest.mark.parametrize("kind", ["missing", "empty", "earlier run", "unfinished run", "link to an earlier run"])
def test_a_claimed_folder_is_empty_but_for_its_marker(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "some" / "where"
    if kind == "empty":
        folder.mkdir(parents=True)
    elif kind == "earlier run":
        earlier_run(folder)
    elif kind == "unfinished run":
        claim_folder(folder, marker=MARKER)
        (folder / "half.txt").write_text("half")
    elif kind == "link to an earlier run":  # to a larger disk
        folder.parent.mkdir()
        folder.symlink_to(earlier_run(tmp_path / "run"), target_is_directory=True)
    claim_folder(folder, marker=MARKER)
    assert [path.name for path in folder.iterdir()] == [MARKER]


@pytest.mark.parametrize("other", ["thesis.txt", ".hidden", "stage/marker.json"])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path: Path, other: str) -> None:
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(CocoaError, match=r"holds something else \(it has no marker\.json\); nothing was written"):
        claim_folder(tmp_path, marker=MARKER)
    assert contents(tmp_path) == before == {other: b"mine"}


@pytest.mark.parametrize(("out", "reason"), [("notes", "notes is a file; give the name"), ("notes/out", "notes")])
def test_a_file_and_a_folder_below_it_are_refused(tmp_path: Path, out: str, reason: str) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CocoaError, match=reason):
        claim_folder(tmp_path / out, marker=MARKER)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_failed_write_leaves_no_scratch_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_each_process_writes_its_own_scratch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
