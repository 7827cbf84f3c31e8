"""The work of a run grows in proportion to the number of files."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel
from PIL import Image
from qdrant_client import QdrantClient

from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.integrations.qdrant.indexing import run


def calls_of(work: Callable[[], object]) -> int:
    """Return how many functions the thread of the caller has called."""
    calls = 0

    def count(frame: Any, event: str, argument: object) -> None:  # noqa: ANN401
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def write(folder: Path, count: int, *, same: bool) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{number}.bmp" for number in range(count)]
    for number, file in enumerate(files):
        if number and same:
            shutil.copy(files[0], file)
        else:
            Image.new("RGB", (8, 8), (number % 250, number // 250, 200)).save(file)
    (folder / "list.txt").write_text("\n".join(map(str, files)))
    return files


@pytest.mark.parametrize("same", [False, True], ids=["different", "copies"])
@pytest.mark.parametrize("kind", ["folder", "list", "paths"])
def test_four_times_as_many_files_are_four_times_as_much_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, same: bool
) -> None:
    calls: dict[int, list[int]] = {}
    monkeypatch.setattr(run, "LOOKUP_RECORDS", 32)
    for count in (75, 300):
        folder = tmp_path / str(count)
        files = write(folder, count, same=same)
        named: Any = {"folder": folder, "list": folder / "list.txt", "paths": files}[kind]
        index = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:")).index
        calls[count] = [calls_of(lambda: index(named, progress=False))]  # noqa: B023
        calls[count].append(calls_of(lambda: index(named, progress=False)))  # noqa: B023
        for file in files[: count // 5]:
            file.unlink()
        calls[count].append(calls_of(lambda: index(named, prune=True, progress=False)))  # noqa: B023
    ratios = [large / small for small, large in zip(*calls.values(), strict=True)]
    # Each group of files reads the payload of the one point that has all copies.
    assert max(ratios) < (9 if same else 5.5), f"four times as many files, {ratios} times as many calls"


def test_many_names_are_not_compared_with_each_image_to_forget_some(tmp_path: Path) -> None:
    files = write(tmp_path / "photos", 200, same=False)
    indexer = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"))
    indexer.index(tmp_path / "photos", progress=False)
    names = [*map(str, range(500)), str(files[0])]
    calls = calls_of(lambda: indexer.forget(names))
    assert indexer.store.count() == 199
    assert calls < len(files) * len(names) / 2
