import os
from pathlib import Path
from typing import Any

import pytest
from table_files import png, write_images, write_table

from cocoa_embed.data.rows import Item
from cocoa_embed.train.data import row_cache
from cocoa_embed.train.data.row_cache import SourceRows, read_sources
from cocoa_embed.train.settings import SourceSettings


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The subsets that are read from their sources, in the order in which they are."""
    found: list[str] = []
    original = row_cache.read_subset
    monkeypatch.setattr(row_cache, "read_subset", lambda name, source: found.append(name) or original(name, source))
    return found


def source(path: Path, **settings: Any) -> SourceSettings:
    return SourceSettings(file=str(path), **settings)


def write(path: Path, *texts: str) -> Path:
    return write_table(path, [{"query_text": text, "positive_text": "x"} for text in texts])


def content(rows: SourceRows) -> tuple[list[str | None], list[int], list[tuple[int, str]], dict[str, int]]:
    bad = [(entry, row.reason) for entry, row in rows.bad]
    return [row.query.text for row in rows.table], rows.entries.tolist(), bad, rows.counts


def test_sources_are_read_once_until_they_or_their_settings_change(
    tmp_path: Path, cache: Path, reads: list[str]
) -> None:
    path, other = write(tmp_path / "a.jsonl", "one", "", "two"), write(tmp_path / "b.csv", "three")
    sources = {"a": source(path), "b": source(other)}
    first = read_sources(sources)
    reason = "the query is empty (query_text)"
    assert content(first) == (["one", "two", "three"], [0, 2, 0], [(1, reason)], {"a": 3, "b": 1})
    assert content(read_sources(sources)) == content(first)
    read_sources({"a": source(path, limit=1, weight=2.5), "b": source(other)})
    assert reads == ["a", "b"], "limits and weights are drawn from the table"
    for changed in ({"a": source(path, query_instruction="Find:"), "b": source(other)}, {"b": source(other)}):
        read_sources(changed)
    read_sources({"a": source(path, limit=1, limit_order="first"), "b": source(other)})
    assert reads[2:] == ["a", "b", "b", "a", "b"]
    write(path, "one", "two", "four")
    assert read_sources(sources).counts == {"a": 3, "b": 1}
    assert reads[-2:] == ["a", "b"]
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    read_sources(sources)
    assert reads[-4:] == ["a", "b"] * 2


def test_images_that_appear_later_are_found_without_reading_their_rows_again(
    tmp_path: Path, cache: Path, reads: list[str]
) -> None:
    path = write_table(tmp_path / "rows.jsonl", [{"query_image": "a.png", "positive_text": "x"}])
    assert len(read_sources({"data": source(path)}).table) == 1
    write_images(tmp_path, "a")
    assert read_sources({"data": source(path)}).table[0].images() == (tmp_path / "a.png",)
    assert reads == ["data"]


def test_images_inside_a_table_are_read_from_it_after_a_second_start(tmp_path: Path, cache: Path) -> None:
    path = write_table(tmp_path / "rows.parquet", [{"query_image": png(n), "positive_text": "x"} for n in range(2)])
    read_sources({"data": source(path)})
    images = [row.images()[0] for row in read_sources({"data": source(path)}).table]
    assert [Item(images=(image,)).load()["image"].getpixel((0, 0)) for image in images] == [(0, 255, 0), (1, 254, 0)]


@pytest.mark.parametrize("fault", ["of another version", "broken", "without a file"])
def test_a_table_that_cannot_be_used_is_written_again(
    tmp_path: Path, cache: Path, reads: list[str], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    sources = {"data": source(write(tmp_path / "a.jsonl", "one", "two"))}
    first = content(read_sources(sources))
    (folder,) = cache.iterdir()
    if fault == "broken":
        (folder / row_cache.TABLE).write_bytes(b"no table")
    elif fault == "without a file":
        (folder / row_cache.ENTRIES).unlink()
    else:
        written = (folder / row_cache.TABLE).with_suffix(".json")
        written.write_text(written.read_text().replace('"version": ', '"version": 9'))
    assert content(read_sources(sources)) == first
    assert len(caplog.messages) == (fault != "without a file")
    assert content(read_sources(sources)) == first
    assert reads == ["data"] * 2


@pytest.mark.parametrize("is_temporary_full", [False, True])
def test_without_a_cache_rows_are_in_a_temporary_file_or_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_temporary_full: bool
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COCOA_CACHE", str(tmp_path / "file" / "cache"))
    temporary = tmp_path / ("file" if is_temporary_full else "temporary")
    monkeypatch.setattr(row_cache.tempfile, "gettempdir", lambda: str(temporary))
    rows = read_sources({"data": source(write(tmp_path / "a.jsonl", "one", "", "two"))})
    assert content(rows)[0] == ["one", "two"]
    assert content(rows)[1:] == ([0, 2], [(1, "the query is empty (query_text)")], {"data": 3})
    assert (rows.table.path is None) == is_temporary_full
    message = f"The cache {tmp_path}/file/cache cannot be written (Not a directory)"
    assert [each.startswith(message) for each in caplog.messages] == [True]


def test_tables_that_no_run_has_opened_for_long_are_removed(tmp_path: Path, cache: Path) -> None:
    old, used, new = ({"data": source(write(tmp_path / f"{name}.jsonl", name))} for name in ("a", "b", "c"))
    read_sources(old)
    read_sources(used)
    of_killed_run = cache / ".key-scratch"
    (of_killed_run / "key").mkdir(parents=True)
    (of_killed_run / "key" / row_cache.TABLE).touch()
    (cache / "other").mkdir()
    for folder in cache.iterdir():
        os.utime(folder, (1, 1))
    read_sources(used)
    read_sources(new)
    assert not of_killed_run.exists()
    assert (cache / "other").is_dir(), "what is no table is not ours to remove"
    assert len(list(cache.iterdir())) == 3
