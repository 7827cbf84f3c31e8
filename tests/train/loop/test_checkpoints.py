from pathlib import Path

import pytest

from cocoa_embed.train.loop.checkpoints import COMPLETE, mark_complete, newest_complete, read_complete


def checkpoint(folder: Path, step: int, *, marked: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(b"1234")
    (path / "inner" / "state").write_bytes(b"12")
    if marked:
        mark_complete(path, step=step)
    return path


def test_the_newest_complete_checkpoint_is_found_by_its_number(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) is None
    assert newest_complete(tmp_path / "nowhere") is None
    checkpoint(tmp_path, 900)
    newest = checkpoint(tmp_path, 1000)
    checkpoint(tmp_path, 2000, marked=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_complete(tmp_path) == newest
    assert read_complete(newest) == {"files": {"inner/state": 2, "weights": 4}, "step": 1000}


@pytest.mark.parametrize("fault", ["removed", "shortened", "unmarked"])
def test_a_checkpoint_that_lost_a_file_is_not_complete(tmp_path: Path, fault: str) -> None:
    path = checkpoint(tmp_path, 1)
    assert newest_complete(tmp_path) == path
    if fault == "removed":
        (path / "inner" / "state").unlink()
    elif fault == "shortened":
        (path / "weights").write_bytes(b"123")
    else:
        (path / COMPLETE).unlink()
    assert newest_complete(tmp_path) is None
