import datetime
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fake_model import FakeModel
from qdrant_client import QdrantClient
from source_files import tar
from table_files import png, write_images, write_table

from cocoa_embed.images.passed_over import PassedOver
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.sources.base import Record
from cocoa_embed.sources.files import file_sources, is_deleted


class ImageFiles:
    """The records of a folder, and the faults that were found."""

    def __init__(self, paths: list[Path], exclude: Sequence[str] = ()) -> None:
        self.unlisted: list[dict[str, str]] = []
        self.passed_over = PassedOver(exclude)
        note = lambda path, reason: self.unlisted.append({"path": str(path), "reason": reason})  # noqa: E731
        sources = file_sources(paths, note, self.passed_over)
        self.records = [record for source in sources for shard in source.shards() for record in shard.records()]

    def __iter__(self) -> Iterator[tuple[str | None, dict[str, Any]]]:
        return map(caption_and_columns, self.records)


def caption_and_columns(record: Record) -> tuple[str | None, dict[str, Any]]:
    columns = dict(record.metadata)
    return columns.pop("text", None), columns


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_captions_and_columns_of_every_format_are_read(tmp_path: Path, kind: str) -> None:
    write_images(tmp_path / "sub", "ab")
    extra = {"day": datetime.date(2026, 1, 2), "score": float("inf"), "tags": ["x"]} if kind == "parquet" else {}
    rows = [{"file_name": "sub/a.png", "text": "a ring", "path": "my/own"}, {"file_name": "gone.png", "text": "x"}]
    metadata = write_table(tmp_path / f"metadata.{kind}", [{**row, **extra} for row in rows])
    files = ImageFiles([tmp_path])
    described, other = files
    stored = {"day": "2026-01-02", "score": None, "tags": ["x"]} if extra else {}
    assert described == ("a ring", {"path": "my/own", **stored})
    assert other == (None, {})
    assert [fault["path"] for fault in files.unlisted] == [f"{metadata}:2" if kind == "jsonl" else f"{metadata}, row 2"]


def test_two_metadata_files_in_a_folder_are_reported_and_neither_is_read(tmp_path: Path) -> None:
    write_images(tmp_path, "a")
    for kind in ("csv", "jsonl"):
        write_table(tmp_path / f"metadata.{kind}", [{"file_name": "a.png", "text": kind}])
    files = ImageFiles([tmp_path])
    assert [caption for caption, _ in files] == [None]
    assert "has metadata.jsonl and metadata.csv; keep one" in files.unlisted[0]["reason"]


def test_a_file_exists_under_its_name_and_under_the_spelling_of_a_payload(tmp_path: Path) -> None:
    for name in (r"\udc80.png", "\udc81.png"):
        (tmp_path / name).touch()
    (tmp_path / "a.tar").touch()
    assert not is_deleted(f"{tmp_path}/a.tar#deep#1.jpg")
    assert is_deleted(f"{tmp_path}/b.tar#1.jpg")
    assert not is_deleted("s3://bucket/a.jpg")
    stored = [rf"{tmp_path}/\udc{byte}.png" for byte in (80, 81, 82)]
    assert [is_deleted(path) for path in stored] == [False, False, True]


def test_a_system_folder_that_is_named_along_with_its_parent_is_searched(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / ".thumbnails", tmp_path / "sub"):
        write_images(folder, "a")
    named = [tmp_path, tmp_path / ".thumbnails" / "a.png", tmp_path / "sub"]
    assert sorted(record.relative_key for record in ImageFiles(named).records) == ["a.png", "a.png", "sub/a.png"]
    assert ImageFiles([tmp_path], ["sub/"]).passed_over.counts == {"system folder": 1, "excluded": 1}


@pytest.mark.usefixtures("few_payload_indexes")
@pytest.mark.parametrize("name", ["photos", "a.tar", "memory://described", "list.csv"])
def test_a_description_that_is_removed_or_emptied_is_removed_from_the_index(tmp_path: Path, name: str) -> None:
    place = name if "://" in name else str(tmp_path / name)

    def write(text: str) -> None:
        if name == "photos":
            write_images(tmp_path / "photos", "a")
            (tmp_path / "photos" / "a.txt").write_text(text)
        elif name == "a.tar":
            (tmp_path / "a.tar").write_bytes(tar([("a.png", png()), *([("a.txt", text.encode())] if text else [])]))
            os.utime(tmp_path / "a.tar", (len(text), len(text)))
        else:
            rows = f"file_name,text\n{'a' if text else 'b'}.png,words\n".encode()
            fsspec.filesystem("memory").pipe({"/described/a.png": png(), "/described/metadata.csv": rows})
            row = {"url": "memory://described/a.png", "text": text}
            write_table(tmp_path / "list.csv", [row if text else {"url": row["url"]}])

    indexer = QdrantIndexer(FakeModel(), client=QdrantClient(":memory:"))
    for text, summary in ("words", (1, 0)), ("", (0, 1)):
        write(text)
        found = indexer.index(place, progress=False)
        assert (found.indexed, found.updated, found.failed) == (*summary, [])
        assert [point.payload["caption"] for point in indexer.store.points()] == [text or None]
