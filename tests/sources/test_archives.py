"""Archives give their images with what is said about them, also the broken ones."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from source_files import parquet_file, read, tar
from table_files import png

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


def test_what_img2dataset_writes_beside_an_archive_describes_it_and_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(tar([("000000001.jpg", png(1)), ("000000002.jpg", png(2))]))
    rows = [{"key": f"00000000{number}", "caption": f"caption {number}", "url": "u"} for number in (1, 2, 3)]
    (tmp_path / "00000.parquet").write_bytes(parquet_file(rows))
    (tmp_path / "00000_stats.json").write_text("{}")
    found = read(tmp_path)
    assert list(found.versions) == [str(tmp_path / "00000.tar")]
    assert found.metadata["00000.tar#000000002.jpg"] == {"key": "000000002", "url": "u", "text": "caption 2"}


def test_an_archive_that_breaks_off_is_named_after_its_good_images(tmp_path: Path) -> None:
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
def test_a_compressed_archive_that_breaks_off_is_named(tmp_path: Path, kept: float) -> None:
    whole = tar([(f"{number}.bmp", bytes(range(256)) * number) for number in range(1, 40)], "w:gz")
    (tmp_path / "a.tar.gz").write_bytes(whole[: int(len(whole) * kept)])
    found = read(tmp_path / "a.tar.gz")
    assert len(found.faults) == 1
    assert str(tmp_path / "a.tar.gz") in found.faults[0]


def test_a_zip_file_gives_its_images_without_what_macos_adds(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
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
