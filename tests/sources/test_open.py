"""A place stands for what it looks like."""

from pathlib import Path
from unicodedata import normalize

import fsspec
import pytest
from source_files import parquet_file, pdf, read, tar, video
from table_files import png

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.images.passed_over import PassedOver
from cocoa_embed.sources.files import FileSource
from cocoa_embed.sources.open import KINDS, NO_OPTIONS, all_sources, shard_files


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
    with pytest.raises(UsageError, match=r"--include pdfs is not a kind of file \(did you mean 'pdf'"):
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


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (source,) = all_sources([tmp_path])
    for name in ("b.png", "folder"):
        (tmp_path / name).symlink_to(name)
    keys = ("a.png", "b.png", "folder/c.png", "b.png#1")
    assert [source.is_deleted(f"{tmp_path}/{key}") for key in keys] == [False, True, True, True]


def test_which_images_many_files_cover_is_decided_without_asking_each() -> None:
    asked: list[str] = []

    class Name(str):
        def __str__(self) -> str:
            asked.append(self)
            return self

    files = shard_files(
        [(Name(f"/data/{number}.tar"), KINDS["archive"]) for number in range(100)], NO_OPTIONS, PassedOver()
    )
    keys = ("/data/7.tar#x.png", "/data/7.png", "/data/100.tar#x.png")
    assert [[files.covers(key) for key in keys] for _ in range(9)] == [[True, False, False]] * 9
    assert len(asked) == 100


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


def test_a_part_of_a_pattern_that_exists_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / "s[1]").mkdir()
    (tmp_path / "s[1]" / "a.tar").write_bytes(tar([("x.png", png(1))]))
    (tmp_path / "s[1]" / "b.png").write_bytes(png(2))
    assert [*read(f"{tmp_path}/s[1]/*.tar").contents.values()] == [png(1)]
    assert [*read(f"{tmp_path}/s[1]/*.png").contents.values()] == [png(2)]


def test_photographs_behind_a_link_are_photographs_and_a_loop_ends(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old.zip.tar").write_bytes(tar([("y.png", png(4))]))
    (tmp_path / "in" / "disk").symlink_to(tmp_path / "disk")
    places = ["a.tar#x.png", "b.parquet#0", "c.PDF#page=1", "disk/old.zip.tar#y.png"]
    assert sorted(read(folder / "in").contents) == places, "of other files, too"
    (tmp_path / "disk" / "photo.png").write_bytes(png(3))
    assert read(folder / "in").contents == {"disk/photo.png": png(3)}


@pytest.mark.parametrize("marker", ["state.json", "dataset_dict.json"])
def test_a_file_named_as_the_marker_of_a_data_set_makes_none(tmp_path: Path, marker: str) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / marker).write_text("{}")
    assert read(tmp_path).contents == {"a.png": png(1)}


@pytest.mark.parametrize("may_be_gone", [False, True])
def test_a_folder_is_found_however_its_accents_are_composed(tmp_path: Path, may_be_gone: bool) -> None:
    composed, on_disk = (tmp_path / normalize(form, "été") for form in ("NFC", "NFD"))
    (on_disk / "sub").mkdir(parents=True)
    (on_disk / "sub" / "x.png").write_bytes(png(1))
    assert not composed.exists()
    (source,) = all_sources([composed], may_be_gone=may_be_gone)
    assert source.covers(f"{on_disk}/gone.png")
    assert read([source]).contents == {"sub/x.png": png(1)}
    (on_disk / "sub" / "x.png").rename(on_disk / "y.png")
    (on_disk / "a.tar").write_bytes(tar([("x.png", png(2))]))
    for place in (f"{composed}/a.tar", f"{composed}/*.tar"):
        assert [*read(all_sources([place], may_be_gone=may_be_gone)).contents] == ["a.tar#x.png"]
    (on_disk / "y.png").unlink()
    assert [*read(composed).contents] == ["a.tar#x.png"]


def test_an_image_in_a_shard_may_have_a_number_sign_in_its_name(folder: Path) -> None:
    fsspec.filesystem("memory").pipe("/signs/a.tar", tar([("x#1.png", png(1))]))
    (folder / "in" / "a.tar").write_bytes(tar([("x#1.png", png(1))]))
    for root in (f"{folder}/in", "memory:///signs"):
        for place in (root, f"{root}/a.tar"):
            (source,) = all_sources([place])
            assert source.covers(f"{root}/a.tar#x#1.png")
            assert not source.is_deleted(f"{root}/a.tar#x#1.png")
            assert source.covers(f"{root}/b.tar#x#1.png") == (place == root)
            assert source.is_deleted(f"{root}/b.tar#x#1.png")


def test_what_describes_a_named_image_is_neither_a_list_nor_a_table(tmp_path: Path) -> None:
    """As the ``photos/*`` of a shell names them all."""
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_text("a ring\nin red")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "n": 1}')
    passed_over = PassedOver()
    found = read(all_sources(sorted(tmp_path.iterdir()), passed_over=passed_over))
    assert (found.metadata, found.faults) == ({"a.png": {"text": "a ring\nin red", "n": 1}}, [])
    assert passed_over.counts == {"description of an image": 2}
    (tmp_path / "a.txt").write_text("a.png\n")
    assert [*read(tmp_path / "a.txt").contents] == ["a.png"], "alone, it is a list"
