"""A key that a source gave is read again, alone, without the rest of its file."""

import io
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from unicodedata import normalize
from unittest.mock import Mock

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from source_files import parquet_file, pdf, tar, video
from table_files import png
from typing_extensions import Buffer

from cocoa_embed.errors import ImageError
from cocoa_embed.sources import keys, remote
from cocoa_embed.sources.base import SourceOptions, storable
from cocoa_embed.sources.keys import load_key, read_key
from cocoa_embed.sources.open import all_sources


def zipped(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, png(number))
    return buffer.getvalue()


def rows_in_groups(suffix: str) -> bytes:
    """Return a table of 200 rows in groups of 70 with two columns of images, one of them a list."""
    rows = [{"a": png(n), "n": n, "b": [png(n + 300), png(n + 600)] if n % 2 else None} for n in range(200)]
    table, buffer = pa.Table.from_pylist(rows), io.BytesIO()
    if suffix == "parquet":
        parquet.write_table(table, buffer, row_group_size=70)
    else:
        make = pa.ipc.new_file if suffix == "file.arrow" else pa.ipc.new_stream
        with make(buffer, table.schema) as writer:
            writer.write_table(table, 70)
    return buffer.getvalue()


FILES = {
    "plain.png": png(1),
    "with#sign.tar#.png": png(2),
    "a.tar": tar([(f"deep/{n}.png", png(n)) for n in range(9)] + [("a#b.png", png(50)), ("é\udcff.png", png(51))]),
    "b.tar.gz": tar([(f"{n}.png", png(n)) for n in range(9)], "w:gz"),
    "has#sign.zip": zipped(["x.png", "y/z#1.png"]),
    "rows.parquet": rows_in_groups("parquet"),
    "one.parquet": parquet_file([{"image": {"bytes": png(3), "path": "x.png"}}, {"image": None}]),
    "rows.file.arrow": rows_in_groups("file.arrow"),
    "rows.stream.arrow": rows_in_groups("stream.arrow"),
    "report.pdf": pdf("red", "green", "blue"),
    "clip.mp4": video(range(0, 250, 2)),
    "clip.mkv": video(range(0, 250, 2), suffix="matroska"),
}


@pytest.fixture(params=["local", "memory"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The files of ``FILES`` by name, on this machine or on a remote file system."""
    root = str(tmp_path) if request.param == "local" else "memory://keys"
    system, folder = fsspec.core.url_to_fs(root)
    system.makedirs(folder, exist_ok=True)
    for name, content in FILES.items():
        system.pipe(f"{folder}/{name}", content)
    yield {name: f"{root}/{name}" if request.param == "local" else f"memory:///keys/{name}" for name in FILES}
    system.rm(folder, recursive=True)


def records(place: str) -> dict[str, bytes]:
    """Return the images that a source gives, by key as a payload has it."""
    options = SourceOptions(every=0.7)
    shards = [shard for source in all_sources([place], options) for shard in source.shards()]
    return {storable(record.key): record.read() for shard in shards for record in shard.records()}


@pytest.mark.parametrize("name", [*FILES])
def test_every_key_of_every_kind_gives_the_bytes_that_were_indexed(places: dict[str, str], name: str) -> None:
    found = records(places[name])
    assert found
    assert ("#" in max(found)) == (name != "plain.png")
    for key, content in found.items():
        if name.startswith("clip"):  # decoding from a key frame or from the start may differ in rounding
            given, expected = (Image.open(io.BytesIO(each)).convert("L").getpixel((60, 40)) for each in
                               (read_key(key), content))  # fmt: skip
            assert abs(given - expected) <= 1, key
        else:
            assert read_key(key) == content, key


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("a.tar#none.png", "a.tar#none.png: is not an image in the archive"),
        ("has#sign.zip#none.png", "none.png: is not an image in the archive"),
        ("rows.parquet#200:a", "#200:a: is not an image in the table"),
        ("rows.parquet#3", "#3: is not an image in the table"),
        ("rows.parquet#2:b", "#2:b: is not an image in the table"),
        ("one.parquet#1", "#1: is not an image in the table"),
        ("rows.file.arrow#900:a", "is not an image in the table"),
        ("rows.parquet#x", "is not an image in the table"),
        ("report.pdf#page=4", "report.pdf#page=4: is not a page; the document has page=1 to page=3"),
        ("report.pdf#3", "is not a page"),
        ("clip.mp4#t=0.05", "clip.mp4#t=0.05: is not a frame of the video"),
        ("clip.mp4#t=99.0", "is not a frame of the video"),
        ("clip.mp4#12", "is not a frame of the video"),
        ("a.tar", "is not an image that can be read"),
        ("gone.tar#1.png", "gone.tar"),
        ("gone.png", "does not exist"),
    ],
)
def test_what_is_not_there_is_reported_in_one_sentence(places: dict[str, str], key: str, reason: str) -> None:
    root = places["a.tar"].removesuffix("a.tar")
    with pytest.raises(ImageError, match="does not exist" if key.startswith("gone") else None) as raised:
        load_key(root + key)
    assert reason in str(raised.value)


def test_broken_files_are_reported_in_one_sentence(tmp_path: Path) -> None:
    for name in ("a.tar#x.png", "a.zip#x.png", "a.parquet#1", "a.arrow#1", "a.pdf#page=1", "a.mp4#t=0.0"):
        (tmp_path / name.partition("#")[0]).write_bytes(b"broken" * 200)
        with pytest.raises(ImageError, match=r"cannot be read \(.+\)"):
            read_key(f"{tmp_path}/{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pypdfium2", None)
        with pytest.raises(ImageError, match=r"pypdfium2 is not installed; run: pip install"):
            read_key(f"{tmp_path}/a.pdf#page=1")


class Counted(io.BytesIO):
    """A file that counts the bytes that are read of it."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data

    def readinto(self, buffer: Buffer, /) -> int:
        count = super().readinto(buffer)
        self.count += count
        return count


@pytest.mark.parametrize("name", ["many.tar#180.png", "many.zip#180.png", "many.parquet#180"])
def test_one_image_of_a_large_file_is_a_small_part_of_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = random.Random(0)
    images = [noise.randbytes(17_000) for _ in range(200)]
    file = name.partition("#")[0]
    if file.endswith("zip"):
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            for number, content in enumerate(images):
                archive.writestr(f"{number}.png", content)
    elif file.endswith("tar"):
        (tmp_path / file).write_bytes(tar((f"{number}.png", content) for number, content in enumerate(images)))
    else:
        table = pa.Table.from_pylist([{"image": content} for content in images])
        parquet.write_table(table, tmp_path / file, row_group_size=20)
    opened: list[Counted] = []

    def counted(place: Path) -> BinaryIO:
        opened.append(Counted(place.read_bytes()))
        return opened[-1]

    monkeypatch.setattr(keys, "open_binary", counted)
    assert read_key(f"{tmp_path}/{name}") == images[180]
    share = opened[0].count / (tmp_path / file).stat().st_size
    assert 0 < share < (0.35 if file.endswith("parquet") else 0.1)


def test_the_web_is_asked_through_the_fetcher_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", Mock(side_effect=AssertionError("behind the fetcher's back")))
    for key in ("http://127.0.0.1/a.png", "HTTPS://example.com/a.tar#x.png", "https://example.com/a.pdf?x=1#page=1"):
        with pytest.raises(ImageError, match="is not among the allowed hosts"):
            read_key(key)
    for key in ("simplecache::http://127.0.0.1/a.png", "zip://x.png::http://127.0.0.1/a.zip"):
        with pytest.raises(ImageError, match="is an address inside another one"):
            read_key(key)
    fetched = Mock()
    fetched.return_value.fetch = lambda address: {"a.tar": tar([("x.png", png(7))]), "b.png": png(8)}[address[-5:]]
    monkeypatch.setattr(remote, "_fetcher", fetched)
    assert read_key("https://example.com/a.tar#x.png", ["example.com"]) == png(7)
    assert read_key("https://example.com/b.png", ["example.com"]) == png(8)
    assert {call.args for call in fetched.call_args_list} == {(("example.com",),)}


def test_paths_are_read_as_payloads_and_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = b"caf\xe9 1.png".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_bytes(png(5))
    (tmp_path / "r s.pdf").write_bytes(pdf("red"))
    monkeypatch.chdir(tmp_path)
    for key in (storable(f"{tmp_path}/{name}"), name, f"file://{tmp_path}/caf%E9%201.png"):
        assert read_key(key) == png(5), key
    assert load_key("r s.pdf#page=1") == load_key(f"FILE://{tmp_path}/r%20s.pdf#page=1")


@pytest.mark.parametrize("typed", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_key_matches_however_its_accents_are_composed(tmp_path: Path, stored: str, typed: str) -> None:
    archive, photo, member = (normalize(stored, name) for name in ("zé.zip", "pé.png", "dé.png"))
    (tmp_path / archive).write_bytes(zipped(["x.png", member, "dé.txt"]))
    (tmp_path / photo).write_bytes(png(1))
    assert read_key(normalize(typed, f"{tmp_path}/{photo}")) == png(1)
    assert read_key(normalize(typed, f"{tmp_path}/{archive}#{member}")) == png(1)
    both = [normalize(form, "dé.png") for form in ("NFD", "NFC")]
    (tmp_path / archive).write_bytes(zipped(both))
    assert [read_key(f"{tmp_path}/{archive}#{name}") for name in both] == [png(0), png(1)], "the exact name is first"
    (tmp_path / archive).write_bytes(zipped([normalize(form, "dé/é.png") for form in ("NFD", "NFC")]))
    with pytest.raises(ImageError, match="is not an image in the archive"):  # either could be meant
        read_key(f"{tmp_path}/{archive}#" + normalize("NFC", "dé/") + normalize("NFD", "é.png"))
