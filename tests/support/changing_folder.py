"""A folder of images that changes as people change theirs, and what a collection of it must hold."""

import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from cocoa_embed.images.load import read_stable_file
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.integrations.qdrant.stores.base import Store

Expected = dict[str, set[str]]


class ChangingFolder:
    """Images of random colours, added, changed, copied, renamed, swapped and removed at random."""

    def __init__(self, folder: Path, seed: int, count: int = 30) -> None:
        self.folder = folder
        (folder / "sub").mkdir(parents=True)
        self._random = random.Random(seed)
        self._made = 0
        for _ in range(count):
            self.add()

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*.png") if path.is_file())

    def change(self, times: int) -> None:
        for _ in range(times):
            change = self._random.choice(
                [self.add, self.add, self.alter, self.copy, self.rename, self.swap, self.remove]
            )
            change()

    def add(self) -> None:
        self._made += 1
        self._paint(self._random.choice([self.folder, self.folder / "sub"]) / f"{self._made}.png")

    def alter(self) -> None:
        self._paint(self._any())

    def copy(self) -> None:
        self._made += 1
        shutil.copyfile(self._any(), self.folder / f"{self._made}-copy.png")

    def rename(self) -> None:
        self._made += 1
        self._any().rename(self.folder / "sub" / f"{self._made}-moved.png")

    def swap(self) -> None:
        one, other = self._any(), self._any()
        if one != other:
            one.rename(self.folder / "x")
            other.rename(one)
            (self.folder / "x").rename(other)

    def remove(self) -> None:
        if len(self.files) > 5:
            self._any().unlink()

    def _any(self) -> Path:
        return self._random.choice(self.files)

    def _paint(self, path: Path) -> None:
        colour = tuple(self._random.randrange(256) for _ in range(3))
        Image.new("RGB", (8 + self._made % 5, 8), colour).save(path)


def holders(files: Iterable[Path]) -> Expected:
    """Return the files that hold each content, by the bytes of the content."""
    found: dict[bytes, set[str]] = {}
    for file in files:
        found.setdefault(read_stable_file(file).data, set()).add(str(file))
    return {content.hex(): paths for content, paths in found.items()}


def assert_exactly(store: Store, files: list[Path], indexer: QdrantIndexer) -> None:
    """Assert that a store holds a point for each content of the files, right in every part, and nothing else."""
    stored = dict(store.scan(["path", "paths", "mtimes", "mtime", "sha256", "bytes"]))
    contents = holders(files)
    assert len(stored) == len(contents) == store.count()
    assert {frozenset(payload["paths"]) for payload in stored.values()} == set(map(frozenset, contents.values()))
    for payload in stored.values():
        assert payload["path"] == payload["paths"][0]
        assert len(payload["paths"]) == len(set(payload["paths"]))
        for path, mtime in zip(payload["paths"], payload["mtimes"], strict=True):
            assert abs(Path(path).stat().st_mtime - mtime) < 1e-6
            assert Path(path).stat().st_size == payload["bytes"]
    for file in files[::7]:
        best = indexer.search(image=file, limit=1)[0]
        assert np.isclose(best.score, 1, atol=1e-5)
