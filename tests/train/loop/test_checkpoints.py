import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cocoa_embed.errors import CocoaError
from cocoa_embed.train.loop.checkpoints import (
    COMPLETE,
    explain_full_disk,
    mark_complete,
    newest_complete,
    read_complete,
)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(b"1234")
    (path / "inner" / "state").write_bytes(b"12")
    mark_complete(path, step=step)
    return path


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: (path / "inner" / "state").unlink(),
        lambda path: (path / "weights").write_bytes(b"123"),
        lambda path: (path / COMPLETE).unlink(),
    ],
)
def test_the_newest_checkpoint_with_all_its_files_is_found_by_its_number(
    tmp_path: Path, break_it: Callable[[Path], object]
) -> None:
    assert newest_complete(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_complete(tmp_path) is None
    checkpoint(tmp_path, 900)
    newest = checkpoint(tmp_path, 1000)
    break_it(checkpoint(tmp_path, 2000))
    assert newest_complete(tmp_path) == newest
    assert read_complete(newest) == {"files": {"inner/state": 2, "weights": 4}, "step": 1000}


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save(torch.zeros(10**6), path),
        lambda path: save_file({"a": torch.zeros(10**6)}, path),
        lambda path: Path(path).write_bytes(bytes(10**6)),
    ],
)
def test_a_full_disk_is_explained_whoever_writes(tmp_path: Path, write: Callable[[str], object]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # Python ignores the signal
    try:
        with pytest.raises(CocoaError, match=r"^The weights cannot be written \(.*; make room, or move the run's"):
            with explain_full_disk("The weights"):
                write(str(tmp_path / "file"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(RuntimeError, match="wrong shapes"), explain_full_disk("The weights"):
        raise RuntimeError("wrong shapes")
