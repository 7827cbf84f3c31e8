"""A place stands for what it looks like."""

from pathlib import Path

import pytest
from source_files import parquet_file, pdf, read, tar, video
from table_files import png

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.sources.files import FileSource
from cocoa_embed.sources.open import all_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with something of every kind, and without a photograph."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar([("x.png", png(1))]))
    (tmp_path / "in" / "b.parquet").write_bytes(parquet_file([{"image": png(2)}]))
    (tmp_path / "in" / "c.PDF").write_bytes(pdf("red"))
    (tmp_path / "d.mp4").write_bytes(video([9] * 3))
    (tmp_path / ".hidden.pdf").write_bytes(pdf("red"))
    return tmp_path


def test_a_folder_without_photographs_gives_everything_else(folder: Path) -> None:
    assert sorted(read(folder).contents) == ["d.mp4#t=0.0", "in/a.tar#x.png", "in/b.parquet#0", "in/c.PDF#page=1"]


def test_a_folder_with_a_photograph_gives_photographs_and_what_is_included(folder: Path) -> None:
    (folder / "in" / "photo.png").write_bytes(png(3))
    assert [*read(folder).contents] == ["in/photo.png"]
    assert [*read(folder, include=frozenset({"pdf"})).contents] == ["in/photo.png", "in/c.PDF#page=1"]
    assert [*read(folder / "in" / "a.tar").contents] == ["a.tar#x.png"]
    with pytest.raises(UsageError, match=r"--include pdfs is no kind of file \(did you mean 'pdf'"):
        read(folder, include=frozenset({"pdfs"}))


def test_patterns_and_file_addresses_name_files(folder: Path) -> None:
    assert [*read(f"{folder}/**/*.tar").contents] == ["in/a.tar#x.png"]
    assert [*read(f"file://{folder}/in/c.PDF").contents] == ["c.PDF#page=1"]
    with pytest.raises(CocoaError, match=r"\*\.zip does not exist, and nothing matches it as a pattern"):
        read(f"{folder}/*.zip")
    assert all_sources([folder / "*.zip"], may_be_gone=True)[0].covers(f"{folder}/old.zip#x.png")


def test_what_a_source_covers_and_misses(folder: Path) -> None:
    (source,) = all_sources([folder])
    assert source.covers(f"{folder}/in/new.tar#x.png")
    assert source.is_deleted(f"{folder}/in/new.tar#x.png")
    assert not source.is_deleted(f"{folder}/in/a.tar#x.png")
    for key in (f"{folder}/in/a.tar", f"{folder}-other/a.tar#x.png", f"{folder}/a.png"):
        assert not source.covers(key), key


def test_a_file_that_is_gone_is_a_fault_of_its_shard(folder: Path) -> None:
    sources = all_sources([folder / "in" / "a.tar"])
    (folder / "in" / "a.tar").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cocoa_embed.sources.shard_files.ShardFiles.is_deleted", lambda self, key: False)
        found = read(sources)
    assert "a.tar: cannot be read" in found.faults[0]
    assert [*found.versions.values()] == ["missing"]


def test_photographs_are_left_to_the_local_files(folder: Path) -> None:
    (folder / "list.txt").write_text("a.png\n")
    places = [folder / "x.png", folder / "list.txt", folder / "new" / "*.jpg"]
    sources = all_sources(places, may_be_gone=True)
    assert {path for source in sources if isinstance(source, FileSource) for path in source.paths} == {*places}
    with pytest.raises(UsageError, match="a path is empty"):
        all_sources(["", *places])
