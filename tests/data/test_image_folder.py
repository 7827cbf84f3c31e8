import json
from pathlib import Path
from unicodedata import normalize

import pytest
from table_files import write_images, write_table

from cocoa_embed.data.image_folder import (
    FILE_COLUMNS,
    MAX_TEXT_BYTES,
    DescribedImage,
    caption_files,
    find_metadata,
    read_metadata,
    unread_table,
)
from cocoa_embed.errors import CocoaError, RowError


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_of_every_format_keep_all_columns(tmp_path: Path, kind: str) -> None:
    write_images(tmp_path / "sub", "a")
    row = {"file_name": "sub/a.png", "text": "ein Fuß", "path": "my own", "captions": ["one", "two"]}
    metadata = write_table(tmp_path / f"metadata.{kind}", [row])
    assert find_metadata(tmp_path) == metadata
    expected = DescribedImage(f"{metadata}, sub/a.png", tmp_path / "sub" / "a.png", row)
    assert list(read_metadata(metadata)) == [expected]


def test_a_byte_order_mark_and_carriage_returns_are_skipped(tmp_path: Path) -> None:
    write_images(tmp_path, "a")
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_bytes(b"\xef\xbb\xbf" + json.dumps({"file_name": "a.png"}).encode() + b"\r\n\n")
    assert [row.columns for row in read_metadata(metadata) if isinstance(row, DescribedImage)] == [
        {"file_name": "a.png"}
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"', "is not JSON"),
        ('{"text": "no name", "day": 3}', "has no 'file_name' (columns found: text, day)"),
        ('{"file_name": 3}', "has no 'file_name'"),
        ('{"file_name": "b.png", "text": ""}', "names 'b.png', which is not in"),
        ('{"file_name": "a\\u0000.png"}', "which is not in"),
        ('{"file_name": "a.png", "score": NaN}', "NaN is not a JSON value"),
        ('{"file_name": "a.png", "text": ["x"]}', "has a text that is a list"),
    ],
)
def test_a_malformed_row_is_named_and_the_others_are_read(tmp_path: Path, line: str, message: str) -> None:
    write_images(tmp_path, "a")
    good = '{"file_name": "a.png", "text": "good"}'
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(f"{good}\n\n{line}\n{good}\n")
    first, fault, last = read_metadata(metadata)
    assert isinstance(first, DescribedImage)
    assert first == last
    assert isinstance(fault, RowError)
    assert fault.source == f"{metadata}:3"
    assert message in fault.reason


def test_a_caption_in_another_column_names_the_columns_found(tmp_path: Path) -> None:
    write_images(tmp_path, "a")
    (row,) = read_metadata(write_table(tmp_path / "metadata.csv", [{"file_name": "a.png", "prompt": "a ring"}]))
    assert isinstance(row, DescribedImage)
    with pytest.raises(RowError, match=r"csv, a\.png: has no 'text' \(columns found: file_name, prompt\); call"):
        _ = row.text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("file_column", FILE_COLUMNS)
def test_other_usual_names_of_the_columns_are_read(tmp_path: Path, file_column: str, kind: str) -> None:
    write_images(tmp_path, "ab")
    captions = {file_column: "b.png", "captions": ["one", "two"], "caption": None}
    rows = [{file_column: "a.png", "captions": None, "caption": "a ring"}, captions]
    first, second = (row for row in read_metadata(write_table(tmp_path / f"metadata.{kind}", rows)))
    assert isinstance(first, DescribedImage)
    assert isinstance(second, DescribedImage)
    assert (first.path.name, first.text, second.text) == ("a.png", "a ring", "one")
    assert (first.wordings, second.wordings) == (["a ring"], ["one", "two"])
    assert first.others == {"captions": None}


def test_a_cell_that_only_begins_as_a_list_is_a_text(tmp_path: Path) -> None:
    write_images(tmp_path, "a")
    (tmp_path / "metadata.csv").write_text(f"file_name,captions\na.png,{'[' * 100_000}\n")
    (row,) = read_metadata(tmp_path / "metadata.csv")
    assert isinstance(row, DescribedImage)
    assert row.columns["captions"] == "[" * 100_000


def test_a_table_that_names_no_images_is_one_error(tmp_path: Path) -> None:
    metadata = write_table(tmp_path / "metadata.csv", [{"picture": "a.png", "text": "a ring"}] * 2)
    with pytest.raises(CocoaError, match=r"no column that names the images \(columns found: picture, text\); call it"):
        list(read_metadata(metadata))


def test_text_files_beside_images_are_captions_and_the_boxes_of_a_detector_are_not(tmp_path: Path) -> None:
    write_images(tmp_path / "sub", "abcdef")
    for name, text in {"a.txt": b"a ring\n", "b.caption": "\ufeffein Fuß".encode(), "c.txt": b"0 0.5 0.5 1 1"}.items():
        (tmp_path / "sub" / name).write_bytes(text)
    (tmp_path / "sub" / "d.txt").write_bytes(b"Fu\xdf")
    (tmp_path / "sub" / "e.txt").write_bytes(b"a" * (MAX_TEXT_BYTES + 1))
    assert find_metadata(tmp_path) == tmp_path
    first, second, *faults = read_metadata(tmp_path)
    assert isinstance(first, DescribedImage)
    assert isinstance(second, DescribedImage)
    assert [(row.path.name, row.text) for row in (first, second)] == [("a.png", "a ring"), ("b.png", "ein Fuß")]
    reasons = [fault.reason for fault in faults if isinstance(fault, RowError)]
    expected = ["has no caption in c.txt", "is not UTF-8", "is too large for a caption", "has no caption in f.txt"]
    assert [reason.startswith(start) for reason, start in zip(reasons, expected, strict=True)] == [True] * 4
    assert len(caption_files(tmp_path)) == 6 + 5


def test_a_table_under_another_name_is_mentioned(tmp_path: Path) -> None:
    write_images(tmp_path, "a")
    write_table(tmp_path / "captions.csv", [{"file_name": "a.png", "text": "a ring"}])
    with pytest.raises(CocoaError, match=r"'captions\.csv' is not read: if it .* call it metadata\.csv"):
        find_metadata(tmp_path)
    (tmp_path / "captions.csv").unlink()
    (tmp_path / "Metadata.json").touch()
    with pytest.raises(CocoaError, match=r"'Metadata\.json' is not read: write it as metadata\.jsonl, one JSON object"):
        find_metadata(tmp_path)
    assert unread_table(["a.png.json", "package.json", "metadata.jsonld"]) is None


def test_names_match_however_their_accents_are_composed(tmp_path: Path) -> None:
    """On disk decomposed and composed; in the table the other way round, in a folder's name too."""
    folder, names = tmp_path / normalize("NFD", "é"), [normalize("NFD", "Café"), normalize("NFC", "Fuße é")]
    write_images(folder, names)
    forms = [normalize("NFC", f"é/{names[0]}.png"), normalize("NFD", f"é/{names[1]}.png")]
    metadata = write_table(tmp_path / "metadata.jsonl", [{"file_name": form, "text": "x"} for form in forms])
    assert not any((tmp_path / form).exists() for form in forms)
    found = [row.path for row in read_metadata(metadata) if isinstance(row, DescribedImage)]
    assert found == [folder / f"{name}.png" for name in names]


def test_a_name_with_two_other_spellings_on_disk_is_an_error(tmp_path: Path) -> None:
    three = ["\u01fa", "\u00c5\u0301", "A\u030a\u0301"]  # Ǻ
    write_images(tmp_path, three[:2])
    metadata = write_table(tmp_path / "metadata.jsonl", [{"file_name": f"{name}.png", "text": "x"} for name in three])
    first, second, fault = read_metadata(metadata)
    assert [row.path.stem for row in (first, second) if isinstance(row, DescribedImage)] == three[:2]
    assert isinstance(fault, RowError)
    assert "only in how accents are composed, rename all but one" in fault.reason


def test_metadata_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match=r"has no metadata\.jsonl \(nor metadata\.csv or metadata\.parquet\)"):
        find_metadata(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CocoaError, match="cannot be read"):
        list(read_metadata(find_metadata(tmp_path)))
    (tmp_path / "metadata.csv").touch()
    with pytest.raises(CocoaError, match=r"has metadata\.jsonl and metadata\.csv; keep one of them"):
        find_metadata(tmp_path)
    with pytest.raises(CocoaError, match="nowhere does not exist; give a folder of images"):
        find_metadata(tmp_path / "nowhere")


def test_a_text_file_has_its_suffix_in_either_case(tmp_path: Path) -> None:
    for name in ("IMG_1.JPG", "IMG_2.JPG", "img_3.png"):
        (tmp_path / name).touch()
    for name, text in {"IMG_1.TXT": "one", "IMG_2.Txt": "no", "IMG_2.txt": "two", "img_3.CAPTION": "three"}.items():
        (tmp_path / name).write_text(text)
    assert find_metadata(tmp_path) == tmp_path
    assert [row.text for row in read_metadata(tmp_path) if isinstance(row, DescribedImage)] == ["one", "two", "three"]
