import json
from pathlib import Path

import pytest
from table_files import write_images, write_table

from cocoa_embed.data.image_folder import DescribedImage, find_metadata, read_metadata
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
        ('{"text": "no name", "path": "a.png"}', "has no 'file_name' (columns found: text, path)"),
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
    (row,) = read_metadata(write_table(tmp_path / "metadata.csv", [{"file_name": "a.png", "caption": "a ring"}]))
    assert isinstance(row, DescribedImage)
    with pytest.raises(RowError, match=r"csv, a\.png: has no 'text' \(columns found: file_name, caption\); call"):
        _ = row.text


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
