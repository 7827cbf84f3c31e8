"""Every kind of source passes over the same files, and counts them."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from source_files import parquet_file, read, tar
from table_files import png

from cocoa_embed.images.passed_over import PassedOver
from cocoa_embed.sources.base import SourceOptions
from cocoa_embed.sources.open import all_sources

COMPANION = b"\0\5\x16\7\0\2\0\0Mac OS X"
FILES = {
    "a.png": png(1),
    "._a.png": COMPANION,
    "._real.png": png(2),
    "sub/b.PNG": png(3),
    "sub/Small_b.png": png(4),
    "drafts/c.png": png(5),
    "drafts/deep/d.png": png(6),
    "@eaDir/a.png/SYNOPHOTO_THUMB_XL.png": png(7),
    "sub/.git/e.png": png(7),
}
KEPT = ["._real.png", "a.png", "sub/b.PNG"]
EXCLUDE = ("drafts/", "small_*", "*.webp")
COUNTS = {"companion of another file": 1, "system folder": 2, "excluded": 2}


@pytest.fixture(params=["folder", "tar", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """``FILES`` in a folder, in an archive, and on a remote file system."""
    if request.param == "memory":
        system = fsspec.filesystem("memory")
        system.pipe({f"/photos/{name}": content for name, content in FILES.items()})
        yield "memory://photos"
        system.rm("/photos", recursive=True)
        return
    if request.param == "tar":
        (tmp_path / "a.tar").write_bytes(tar([(f"./{name}", content) for name, content in FILES.items()]))
        yield str(tmp_path / "a.tar")
        return
    for name, content in FILES.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    yield str(tmp_path / "photos")


def names_and_counts(place: str, passed_over: PassedOver) -> list[str]:
    found = read(all_sources([place], SourceOptions(exclude=EXCLUDE), passed_over=passed_over))
    assert found.faults == []
    return sorted(name.rpartition("#")[2].removeprefix("./") for name in found.contents)


def test_a_folder_an_archive_and_a_bucket_give_the_same_images_and_counts(place: str) -> None:
    passed_over = PassedOver(EXCLUDE)
    assert names_and_counts(place, passed_over) == KEPT
    assert (passed_over.counts, passed_over.unused) == (COUNTS, ["*.webp"])
    assert len(read(place).contents) == len(FILES) - 3, "without patterns, companions and system folders alone"


def test_a_pattern_of_remote_files_passes_over_what_a_folder_does(place: str) -> None:
    if place.endswith(".tar"):
        pytest.skip("an archive is no folder")
    passed_over = PassedOver(EXCLUDE)
    found = names_and_counts(f"{place}/**/*.[pP][nN][gG]", passed_over)
    assert set(found) - {"._real.png"} == {"a.png", "sub/b.PNG"}
    assert passed_over.counts["excluded"] == 2


def test_archives_and_tables_below_a_folder_are_excluded_too(tmp_path: Path) -> None:
    for name in ("a.tar", "old/b.tar", "@eaDir/c.tar", "._d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar([("x.png", png(1))]))
    (tmp_path / "._d.tar").write_bytes(COMPANION)
    (tmp_path / "rows.parquet").write_bytes(parquet_file([{"image": png(2)}]))
    passed_over = PassedOver(["old/", "*.parquet"])
    sources = all_sources([tmp_path], SourceOptions(exclude=("old/", "*.parquet")), passed_over=passed_over)
    assert [*read(sources).contents] == ["a.tar#x.png"]
    assert passed_over.counts == {"system folder": 1, "excluded": 2}
    by_pattern = all_sources([f"{tmp_path}/**/*.tar"], SourceOptions(exclude=("old/",)))
    assert [*read(by_pattern).contents] == ["a.tar#x.png"]


def test_a_marked_folder_on_a_remote_file_system_is_passed_over_unless_it_is_named() -> None:
    system = fsspec.filesystem("memory")
    system.pipe({"/cache/x.png": png(1), "/cache/in/y.png": png(2), "/cache/in/CACHEDIR.TAG": b"x"})
    assert [*read("memory://cache").contents] == ["x.png"]
    assert [*read("memory://cache/in").contents] == ["y.png"]
    system.rm("/cache", recursive=True)


@pytest.mark.parametrize("size", [0, 2**21])
def test_a_member_of_a_strange_size_is_a_fault_unless_it_is_excluded(tmp_path: Path, size: int) -> None:
    members = [("._x.txt", bytes(size)), ("._x.png", b""), ("drafts/y.png", b"")]
    (tmp_path / "a.tar").write_bytes(tar(members))
    faults = read(tmp_path / "a.tar", exclude=("drafts/",)).faults
    assert [fault.partition("#")[2][:7] for fault in faults] == ["._x.png"]


def test_a_pattern_may_match_in_an_archive_that_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("x.png", png(1))]))
    passed_over = PassedOver(["small/"])
    (source,) = all_sources([tmp_path / "a.tar"], SourceOptions(exclude=("small/",)), passed_over=passed_over)
    (shard,) = source.shards()
    passed_over.warn_of_unused()
    assert not caplog.text
    list(shard.records())
    passed_over.warn_of_unused()
    assert "--exclude small/: nothing matches it" in caplog.text
