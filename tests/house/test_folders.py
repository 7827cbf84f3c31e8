from pathlib import Path
from unittest.mock import Mock

import pytest
from exported import contents

from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import claim_folder, refuse_foreign_folder, write_atomically

MARKER = "marker.json"


def test_a_claimed_folder_is_empty_but_for_its_marker(tmp_path: Path) -> None:
    folder, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)  # to a larger disk
    for place in (folder, folder, link):
        claim_folder(place, marker=MARKER)
        assert contents(folder) == {MARKER: b""}
        (folder / "stage").mkdir()
        (folder / "stage" / "weights").write_bytes(b"old")
        (folder / "half.txt").write_text("half")


@pytest.mark.parametrize("names", [("a", MARKER, "z"), ("z", MARKER, "a"), (MARKER, "a", "z")])
def test_a_folder_that_was_being_emptied_can_be_claimed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    entries, real = [tmp_path / name for name in names], Path.unlink

    def unlink(path: Path) -> None:
        real(path)
        if len(contents(tmp_path)) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda path: iter(entries))  # in the order of a disk
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            claim_folder(tmp_path, marker=MARKER)
    assert len(contents(tmp_path)) == 1, "the premise: something is left"
    refuse_foreign_folder(tmp_path, marker=MARKER)


@pytest.mark.parametrize(
    ("other", "out", "reason"),
    [
        ("stage/marker.json", ".", r"holds something else \(it has no marker\.json\); nothing was written"),
        ("notes", "notes", "notes is a file; give the name"),
        ("notes", "notes/out", "notes"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, other: str, out: str, reason: str) -> None:
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("mine")
    with pytest.raises(CocoaError, match=reason):
        claim_folder(tmp_path / out, marker=MARKER)
    assert contents(tmp_path) == {other: b"mine"}


def test_a_failed_write_leaves_no_scratch_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_each_process_writes_its_own_scratch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cocoa_embed.folders.os.replace", Mock(side_effect=KeyboardInterrupt))  # killed before the end
        for process in (7, 8):
            patch.setattr("cocoa_embed.folders.os.getpid", lambda process=process: process)
            with pytest.raises(KeyboardInterrupt):
                write_atomically(tmp_path / "a.json", "text")
    assert contents(tmp_path) == {"a.json.7.new": b"text", "a.json.8.new": b"text"}
    write_atomically(tmp_path / "a.json", "other")
    assert (tmp_path / "a.json").read_text() == "other"
