"""Remote file systems give what local folders give; an S3 server on this machine stands for a bucket."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from source_files import parquet_file, pdf, read, tar
from table_files import png, write_table

from cocoa_embed.data.places import mtime_of
from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.sources import remote
from cocoa_embed.sources.base import SourceOptions
from cocoa_embed.sources.open import all_sources

FILES = {
    "photos/a.png": png(1),
    "photos/b/c.PNG": png(2),
    "photos/b/._c.png": b"\0\5\x16\7",
    "photos/b/notes.md": b"no image",
    "photos/report.pdf": pdf("red", "blue"),
    "shards/0.tar": tar([("x.png", png(3)), ("x.txt", b"words")]),
    "shards/1.parquet": parquet_file([{"image": png(4), "text": "more"}]),
    "empty/readme.md": b"nothing",
}


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """An S3 server on loopback, found through the environment as any other is."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a folder with ``FILES``."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    address = f"{request.param}://bucket/files"
    system, path = fsspec.core.url_to_fs(address)
    for name, content in FILES.items():
        system.pipe(f"{path}/{name}", content)
    system.invalidate_cache()
    yield system.unstrip_protocol(path)
    system.rm(path, recursive=True)
    system.invalidate_cache()


def test_a_folder_gives_its_photographs_and_the_kinds_that_are_asked_for(root: str) -> None:
    assert read(f"{root}/photos").contents == {"a.png": png(1), "b/c.PNG": png(2)}
    found = read(f"{root}/photos/", include=frozenset({"pdf"}))
    assert [*found.contents] == ["a.png", "b/c.PNG", "report.pdf#page=1", "report.pdf#page=2"]
    assert read(f"{root}/shards").metadata == {"0.tar#x.png": {"text": "words"}, "1.parquet#0": {"text": "more"}}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_the_metadata_of_a_folder_describe_its_images(
    root: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"file_name": "b/c.PNG", "text": "a caption", "licence": "CC0"}]
    content = write_table(tmp_path / name, rows).read_bytes()
    system, path = fsspec.core.url_to_fs(f"{root}/photos/{name}")
    system.pipe(path, content)
    assert read(f"{root}/photos").metadata == {"a.png": {}, "b/c.PNG": {"text": "a caption", "licence": "CC0"}}
    system.pipe(path, b"{" if name == "metadata.jsonl" else b"text\nalone\n")
    faults: list[str] = []
    found = read(all_sources([f"{root}/photos"], on_error=lambda place, reason: faults.append(f"{place}: {reason}")))
    assert (len(found.contents), any(found.metadata.values())) == (2, False)
    if name == "metadata.parquet":
        assert "metadata.parquet: " in faults[0]
        assert "cannot be read" in faults[0]
    else:
        assert f"{name}#0 has no file_name" in caplog.text


def test_a_metadata_file_counts_as_checked_only_if_all_of_it_is_read(root: str) -> None:
    system, path = fsspec.core.url_to_fs(f"{root}/photos")
    for row, is_checked in (b'{"file_name": "a.png", "text": "a"}', True), (b'{"file_name": "x"}', True), (b"{", False):
        system.pipe(f"{path}/metadata.jsonl", row)
        (source,) = all_sources([f"{root}/photos"])
        records = [record for shard in source.shards() for record in shard.records()]
        expected = {f"{root}/photos/metadata.jsonl"} if is_checked else set()
        assert [record.checked_sources for record in records] == [expected] * 2, "also in a folder below"
    system.rm(f"{path}/metadata.jsonl")


def test_files_and_patterns_are_taken_as_they_are_named(root: str) -> None:
    assert [*read(f"{root}/photos/a.png").contents] == ["a.png"]
    assert [*read(f"{root}/photos/**/*.[pP][nN][gG]").contents] == ["a.png", "b/c.PNG"]
    assert [*read(f"{root}/shards/*.tar").contents] == ["0.tar#x.png"]
    assert [*read(f"{root}/photos/report.pdf").contents] == ["report.pdf#page=1", "report.pdf#page=2"]
    for name in ("nowhere", "empty", "shards/*.zip", "photos/b/notes.md"):
        with pytest.raises(CocoaError, match="does not exist, or has no images"):
            read(f"{root}/{name}")


def test_records_have_the_size_and_the_mtime_of_the_file_and_shards_a_version(root: str) -> None:
    (source,) = all_sources([f"{root}/photos"])
    first, *_ = [record for shard in source.shards() for record in shard.records()]
    assert first.key == f"{root}/photos/a.png"
    assert first.size == len(png(1))
    assert abs(first.mtime - time.time()) < 60
    system, path = fsspec.core.url_to_fs(root)
    before, again = (read(f"{root}/shards/0.tar").versions for _ in range(2))
    system.pipe(f"{path}/shards/0.tar", tar([("y.png", png(5))]))
    assert before == again != read(f"{root}/shards/0.tar").versions


def test_what_a_source_covers_is_deleted_once_it_is_gone(root: str) -> None:
    (photos,), (shards,) = all_sources([f"{root}/photos"]), all_sources([f"{root}/shards/*.tar"])
    (named,) = all_sources([f"{root}/photos/a.png"])
    assert photos.covers(f"{root}/photos/gone.png")
    assert shards.covers(f"{root}/shards/gone.tar#x.png")
    assert not named.covers(f"{root}/photos/b/c.PNG")
    for source, key in ((photos, "shards/a.png"), (photos, "photos/report.pdf#page=1"), (shards, "shards/1.parquet#0")):
        assert not source.covers(f"{root}/{key}"), key
    assert photos.is_deleted(f"{root}/photos/gone.png")
    assert shards.is_deleted(f"{root}/shards/gone.tar#x.png")
    assert not shards.is_deleted(f"{root}/shards/0.tar#x.png")
    assert all_sources([f"{root}/gone/*.tar"], may_be_gone=True)


def test_an_address_where_nothing_is_left_covers_what_was_there(root: str) -> None:
    for name in (f"{root}/gone", f"{root}/gone/a.png"):
        (gone,) = all_sources([name], may_be_gone=True)
        assert (gone.name, [*gone.shards()]) == (name, [])
        assert gone.covers(f"{root}/gone/a.png")
        assert gone.is_deleted(f"{root}/gone/a.png")
    assert not gone.covers(f"{root}/gone/b.png")
    (gone,) = all_sources([f"{root}/gone"], may_be_gone=True)
    assert gone.covers(f"{root}/gone/w.tar#0.png")
    assert gone.is_deleted(f"{root}/gone/w.tar#0.png")
    assert not gone.is_deleted(f"{root}/shards/0.tar#x.png")
    assert not gone.covers(f"{root}/gone-too/a.png")


def test_a_file_that_cannot_be_read_is_named(root: str) -> None:
    (source,) = all_sources([f"{root}/photos/a.png"])
    (record,) = [record for shard in source.shards() for record in shard.records()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "open_binary", Mock(side_effect=OSError("connection reset")))
        with pytest.raises(ImageError, match=r"photos/a.png: cannot be read \(connection reset\)"):
            record.read()
        patch.setattr("cocoa_embed.images.load.MAX_IMAGE_BYTES", 9)
        with pytest.raises(ImageError, match="is too large"):
            record.read()
    assert record.read() == png(1)
    system, path = fsspec.core.url_to_fs(f"{root}/photos/a.png")
    system.rm(path)
    with pytest.raises(ImageError, match="does not exist"):
        record.read()
    system.pipe(path, b"")


def test_an_unknown_file_system_is_reported_in_one_sentence() -> None:
    for address in ("nonsense://bucket/a", "s3://"):
        with pytest.raises(CocoaError, match=address):
            all_sources([address])


def test_a_bucket_that_is_not_there_is_reported_in_one_sentence(s3: None) -> None:
    with pytest.raises(CocoaError, match="s3://none/photos"):
        all_sources(["s3://none/photos"])


@pytest.mark.parametrize(
    ("info", "seconds"),
    [({"mtime": 12}, 12.0), ({"updated": "1970-01-01T00:00:09Z"}, 9.0), ({"LastModified": "soon"}, 0.0), ({}, 0.0)],
)
def test_the_time_of_a_change_is_read_as_file_systems_write_it(info: dict[str, object], seconds: float) -> None:
    assert mtime_of(info) == seconds


def test_an_abandoned_remote_source_leaves_no_thread(root: str, tmp_path: Path) -> None:
    import threading

    (tmp_path / "a.tar").write_bytes(tar([(f"{number}.png", png(number)) for number in range(200)]))
    (source,) = all_sources([tmp_path / "a.tar"], SourceOptions())
    (shard,) = source.shards()
    with closing(shard.records()) as records:  # type: ignore[type-var]
        next(records)
        assert any(thread.name.startswith("cocoa-shard") for thread in threading.enumerate())
    assert not any(thread.name.startswith("cocoa-shard") for thread in threading.enumerate())
