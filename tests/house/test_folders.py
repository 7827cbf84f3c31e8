import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from exported import contents

from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import LOCK_FILE, claim_folder, only_writer, refuse_foreign_folder, write_atomically

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


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with only_writer(folder, marker=MARKER):
        claim_folder(folder, marker=MARKER)
        with (
            pytest.raises(CocoaError, match=r"another run is writing to .*out; wait for it"),
            only_writer(folder, marker=MARKER),
        ):
            raise AssertionError
        assert set(contents(folder)) == {MARKER, LOCK_FILE}, "and the first one's lock stays"
    assert set(contents(folder)) == {MARKER}
    with only_writer(folder, marker=MARKER):
        assert set(contents(folder)) == {MARKER, LOCK_FILE}


def test_a_killed_writer_keeps_nobody_out_even_if_a_data_loader_outlives_it(tmp_path: Path) -> None:
    code = f"""
import os, signal, time
from pathlib import Path
from cocoa_embed.folders import only_writer
with only_writer(Path({str(tmp_path)!r}), marker={MARKER!r}):
    if child := os.fork():
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(1)
    time.sleep(60)
"""
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert set(contents(tmp_path)) == {LOCK_FILE}, "the premise: it was killed while it held the lock"
    try:
        with only_writer(tmp_path, marker=MARKER):
            claim_folder(tmp_path, marker=MARKER)
    finally:
        os.kill(int(killed.stdout), signal.SIGKILL)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_written_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(code, "no locks")))
    with only_writer(tmp_path / "out", marker=MARKER):
        claim_folder(tmp_path / "out", marker=MARKER)
    assert set(contents(tmp_path / "out")) == {MARKER}
    assert "out is on a file system without locks" in caplog.text


def test_a_writer_that_writes_nothing_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(KeyError), only_writer(tmp_path / name, marker=MARKER):
            raise KeyError
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]
    assert not any((tmp_path / "empty").iterdir())
    (tmp_path / "file").touch()
    with (
        pytest.raises(CocoaError, match=r"file/out cannot be written \(Not a directory\); give another folder"),
        only_writer(tmp_path / "file" / "out", marker=MARKER),
    ):
        raise AssertionError


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
