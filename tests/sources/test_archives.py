"""Archives give their images with what is said about them, also the broken ones."""

import io
import json
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from source_files import parquet_file, read, tar
from table_files import png

from cocoa_embed.errors import ImageError
from cocoa_embed.images.load import MAX_IMAGE_BYTES
from cocoa_embed.images.passed_over import PassedOver
from cocoa_embed.sources import archives
from cocoa_embed.sources.open import all_sources

SAMPLES = [
    (f"part/{number:03}.{suffix}", content)
    for number in range(3)
    for suffix, content in (
        ("json", json.dumps({"licence": "CC0", "n": number}).encode()),
        ("png", png(number)),
        ("txt", f"text {number}\n".encode()),
    )
]


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")]
)
def test_the_files_of_a_sample_describe_its_image(tmp_path: Path, name: str, mode: str) -> None:
    (tmp_path / name).write_bytes(tar(SAMPLES, mode))
    found = read(tmp_path / name)
    assert found.contents == {f"{name}#part/{number:03}.png": png(number) for number in range(3)}
    assert found.metadata[f"{name}#part/001.png"] == {"licence": "CC0", "n": 1, "text": "text 1"}
    assert not found.faults


@pytest.mark.parametrize("name", ["00000.tar", "00000.TAR"])
def test_the_table_that_img2dataset_writes_next_to_an_archive_describes_it_and_is_not_read_alone(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(tar([("000000001.jpg", png(1)), ("000000002.jpg", png(2))]))
    rows = [{"key": f"00000000{number}", "caption": f"caption {number}", "url": "u"} for number in (1, 2, 3)]
    (tmp_path / "00000.parquet").write_bytes(parquet_file(rows))
    (tmp_path / "00000_stats.json").write_text("{}")
    found = read(tmp_path)
    assert list(found.versions) == [str(tmp_path / name)]
    assert found.metadata[f"{name}#000000002.jpg"] == {"key": "000000002", "url": "u", "text": "caption 2"}


def test_a_truncated_archive_is_reported_after_its_good_images(tmp_path: Path) -> None:
    whole = tar([(f"{number}.png", png(number)) for number in range(4)])
    step = 512
    for length in range(0, 4 * 2 * step + step, step // 2):  # inside of headers, of contents, and between
        (tmp_path / "a.tar").write_bytes(whole[:length])
        found = read(tmp_path / "a.tar")
        good = length // (2 * step) + (length % (2 * step) >= step + len(png(length // (2 * step))))
        assert list(found.contents.values()) == [png(number) for number in range(good)], length
        is_whole = length == len(whole)
        assert is_whole or ("a.tar: cannot be read" in found.faults[0] and len(found.faults) == 1), length
    (tmp_path / "a.tar").write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
    broken = read(tmp_path / "a.tar")
    assert len(broken.contents) == 1
    assert "cannot be read after 1 image" in broken.faults[0]


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_compressed_archive_is_reported(tmp_path: Path, kept: float) -> None:
    whole = tar([(f"{number}.bmp", bytes(range(256)) * number) for number in range(1, 40)], "w:gz")
    (tmp_path / "a.tar.gz").write_bytes(whole[: int(len(whole) * kept)])
    found = read(tmp_path / "a.tar.gz")
    assert len(found.faults) == 1
    assert str(tmp_path / "a.tar.gz") in found.faults[0]


def test_a_zip_file_gives_its_images_without_what_macos_adds(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("folder.png/", b"")
        archive.writestr("holiday/a.png", png(1))
        archive.writestr("holiday/a.txt", "the beach")
        archive.writestr("__MACOSX/holiday/._a.png", b"\0\5\x16\7")
        archive.writestr("holiday/b.png", png(2) * 50, zipfile.ZIP_DEFLATED)
    content = bytearray(buffer.getvalue())
    (tmp_path / "photos.zip").write_bytes(content)
    assert read(tmp_path / "photos.zip").metadata == {
        "photos.zip#holiday/a.png": {"text": "the beach"},
        "photos.zip#holiday/b.png": {},
    }
    place = content.index(png(1))
    content[place + 60] ^= 0xFF
    (tmp_path / "photos.zip").write_bytes(content)
    found = read(tmp_path / "photos.zip")
    assert [*found.contents] == ["photos.zip#holiday/b.png"]
    assert "a.png: cannot be read (Bad CRC" in found.faults[0]
    (tmp_path / "photos.zip").write_bytes(content[:200])
    assert "photos.zip: cannot be read (File is not a zip file)" in read(tmp_path / "photos.zip").faults[0]


def test_an_archive_of_any_length_keeps_few_headers_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(tar([(f"{number}.png", png(number % 8)) for number in range(300)]))
    lengths: list[int] = []
    original = __import__("tarfile").TarFile.next

    def counted(self: object) -> object:
        lengths.append(len(self.members))  # type: ignore[attr-defined]
        return original(self)

    monkeypatch.setattr("tarfile.TarFile.next", counted)
    assert len(read(tmp_path / "a.tar").contents) == 300
    assert max(lengths) <= 1


def test_the_version_of_an_archive_changes_with_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar(SAMPLES))
    (before,) = read(path, every=3.0).versions.values()
    (again,) = read(path).versions.values()
    (excluding,) = read(path, exclude=("*.gif",)).versions.values()
    path.write_bytes(tar(SAMPLES[:3]))
    (after,) = read(path).versions.values()
    assert before == again != after
    assert excluding != before, "other patterns, other images"


def test_a_text_of_the_whole_name_of_an_image_describes_no_other_of_its_sample(tmp_path: Path) -> None:
    members = {
        **{f"2024.0{number}.png": png(number) for number in (1, 2, 3)},
        **{f"2024.0{number}.txt": b"%d" % number for number in (1, 2)},
        "2024.json": b'{"album": "x", "text": null}',
        **{"b.left.png": png(4), "b.txt": b"b"},
    }
    (tmp_path / "a.tar").write_bytes(tar(members.items()))
    assert read(tmp_path / "a.tar").metadata == {
        "a.tar#2024.01.png": {"text": "1", "album": "x"},
        "a.tar#2024.02.png": {"text": "2", "album": "x"},
        "a.tar#2024.03.png": {"album": "x"},
        "a.tar#b.left.png": {"text": "b"},
    }


def test_a_malformed_description_describes_nothing_and_breaks_no_archive(tmp_path: Path) -> None:
    members = {"a.png": png(1), "a.json": b"[" * 100_000, "b.png": png(2), "b.cls": "²".encode(), "c.png": png(3)}
    (tmp_path / "a.tar").write_bytes(tar(members.items()))
    found = read(tmp_path / "a.tar")
    assert found.metadata == {"a.tar#a.png": {}, "a.tar#b.png": {"cls": "²"}, "a.tar#c.png": {}}
    assert not found.faults


def test_a_sample_of_many_images_is_not_in_memory_at_once_and_keeps_the_texts_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archives, "MAX_SAMPLE_BYTES", 100)
    names = [f"2024.{number:03}.{suffix}" for number in range(40) for suffix in ("png", "txt")]
    found = [*archives.samples(archives.Member(name, b"x" * 25) for name in names)]
    assert [member.name for sample in found for member in sample] == names
    assert max(len(sample) for sample in found) == 6
    assert {sample[0].suffix for sample in found} == {".png"}


def test_the_largest_images_of_a_sample_have_its_text() -> None:
    class Largest(bytes):
        def __len__(self) -> int:
            return MAX_IMAGE_BYTES

    sample = [archives.Member(name, Largest()) for name in ("a.jpg", "a.seg.png")] + [archives.Member("a.txt", b"a")]
    assert [*archives.samples(sample)] == [sample]


def test_a_corrected_table_beside_an_archive_is_another_version_of_it(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar([("1.png", png(1))]))
    alone = read(tmp_path / "0.tar").versions
    (tmp_path / "0.parquet").write_bytes(parquet_file([{"key": "1", "caption": "wrong"}]))
    wrong, again = (read(tmp_path / "0.tar").versions for _ in range(2))
    (tmp_path / "0.parquet").write_bytes(parquet_file([{"key": "1", "caption": "corrected"}]))
    right = read(tmp_path / "0.tar")
    assert len({*alone.values(), *wrong.values(), *right.versions.values()}) == 3
    assert wrong == again
    assert right.metadata["0.tar#1.png"]["text"] == "corrected"


def test_a_table_beside_an_archive_that_is_not_there_does_not_matter(tmp_path: Path) -> None:
    for number, beside in enumerate(("link", "folder")):
        folder = tmp_path / beside
        folder.mkdir()
        (folder / "0.tar").write_bytes(tar([("1.png", png(number))]))
        table = folder / "0.parquet"
        table.mkdir() if beside == "folder" else table.symlink_to("gone.parquet")
        found = read(folder)
        assert [*found.metadata] == ["0.tar#1.png"]


def test_an_archive_counts_as_checked_only_up_to_where_it_is_whole(tmp_path: Path) -> None:
    whole = tar([("1.png", png(1)), ("2.png", png(2)), ("2.txt", b"two")])
    for content, expected in (whole, [True, True]), (whole[: len(png(2)) + 2048], [True, False]):
        (tmp_path / "a.tar").write_bytes(content)
        (shard,) = all_sources([tmp_path / "a.tar"])[0].shards()
        records = []
        with suppress(ImageError):
            records.extend(shard.records())
        assert [record.checked_sources == {str(tmp_path / "a.tar")} for record in records] == expected


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "remote.zip"])
def test_descriptions_apart_from_their_images_are_used_in_a_zip_file_and_reported_elsewhere(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    images = {"p/a.png": png(1), "p/b.left.png": png(2), "p/2024.01.png": png(3), "p/c.png": png(4)}
    texts = {"c.txt": b"c", "2024.02.txt": b"2", "a.txt": b"a", "a.json": b'{"n": 1}', "b.txt": b"b", "R.txt": b"R"}
    packed = {**images, **{f"p/{text}": content for text, content in texts.items()}, "p/2024.02.png": png(5)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, content in packed.items():
            archive.writestr(member, content)
    content = tar(packed.items()) if name == "a.tar" else buffer.getvalue()
    (tmp_path / name).write_bytes(content)
    fsspec.filesystem("memory").pipe(f"/apart/{name}", content)
    passed_over = PassedOver()
    place = f"memory:///apart/{name}" if name == "remote.zip" else str(tmp_path / name)
    metadata = read(all_sources([place], passed_over=passed_over)).metadata
    found = {key.removeprefix(f"{name}#p/"): columns for key, columns in metadata.items()}
    beside = {"a.png": {}, "b.left.png": {}, "2024.01.png": {}, "c.png": {"text": "c"}, "2024.02.png": {"text": "2"}}
    if name == "a.zip":
        assert found == {**beside, "a.png": {"text": "a", "n": 1}, "b.left.png": {"text": "b"}}
        assert (passed_over.counts, caplog.text) == ({}, "")
    else:
        assert found == {**beside, "2024.02.png": {}}
        assert passed_over.counts == {"description apart from its image": 4}
        assert f"{name}: 4 descriptions, such as p/" in caplog.text
        assert "tar --sort=name" in caplog.text


def test_a_text_that_describes_another_image_of_its_sample_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = {"2024.1.png": png(1), "2024.2.txt": b"2", "x.png": png(2), "2024.2.png": png(3), "2024.json": b"{}"}
    (tmp_path / "a.tar").write_bytes(tar(members.items()))
    passed_over = PassedOver()
    read(all_sources([tmp_path / "a.tar"], passed_over=passed_over))
    assert passed_over.counts == {"description apart from its image": 1}
    assert "a.tar: 1 description, such as 2024.2.txt, did not reach the image of the same name" in caplog.text


@pytest.mark.parametrize("excluded", [(), ("*.03.png",)])
def test_a_text_in_a_zip_file_whose_image_is_missing_or_excluded_describes_no_other(
    tmp_path: Path, excluded: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    images = ["2024.01.png", "./2024.02.png", "z.png", *(["2024.03.png"] if excluded else [])]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, name in enumerate(images):
            archive.writestr(name, png(number))
        for name in ("y.txt", "2024.03.txt", "2024.02.txt"):
            archive.writestr(name, name)
    metadata = read(tmp_path / "a.zip", exclude=excluded).metadata
    assert [columns.get("text") for columns in metadata.values()] == [None, "2024.02.txt", None]
    assert "did not reach" not in caplog.text


def test_the_files_of_a_sample_that_is_split_are_next_to_each_other_in_a_zip_file() -> None:
    names = ["d/", "/", "2024.1.png", "b.png", "2024.2.png", "2024.1.txt", "b.txt", "2024.2.txt", "b.png"]
    found = [entry.filename for entry in archives.sorted_by_sample([*map(zipfile.ZipInfo, names)])]
    together = ["2024.1.png", "2024.1.txt", "2024.2.png", "2024.2.txt", "b.png", "b.txt", "b.png"]
    assert [name for name in found if not name.endswith("/")] == together


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_metadata_file_in_an_archive_is_reported(
    tmp_path: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    members = [(f"/p/{table}", b"x"), (f"q/{table}", b"x"), ("p/x.png", png(1))]
    (tmp_path / "a.tar").write_bytes(tar(members))
    passed_over = PassedOver()
    assert read(all_sources([tmp_path / "a.tar"], passed_over=passed_over)).metadata == {"a.tar#p/x.png": {}}
    assert passed_over.counts == {"metadata file in an archive": 2}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"a.tar: metadata files in an archive are not read (2, such as /p/{table}); unpack it" in warning
    caplog.clear()
    read(tmp_path / "a.tar", exclude=(table,))
    assert not caplog.text


def test_repeated_names_and_links_are_passed_over_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("x.png", png(1)), ("x.png", png(2)), ("y.png", png(3))]))
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("symbolic.png", tarfile.SYMTYPE), ("link", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "x.png"
            archive.addfile(link)
    passed_over = PassedOver()
    found = read(all_sources([tmp_path / "a.tar"], passed_over=passed_over))
    assert [*found.contents.values()] == [png(1), png(3)]
    assert not found.faults
    assert passed_over.counts == {"link in an archive": 2, "name again in an archive": 1}
