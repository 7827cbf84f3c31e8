import json
import re
from pathlib import Path

import pytest
from PIL import Image

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.template import RESERVED_TOKENS
from cocoa_embed.train.data.caption_rows import read_image_folder

LINES: list[dict[str, object]] = [
    {"file_name": "b.png", "text": "a red ring", "captions": ["a red ring", "ring, red"]},
    {"file_name": "a.png", "text": "a blue cross", "captions": ["a blue cross", "cross, blue", "one cross"]},
    {"file_name": "c.png", "text": "a star"},
]


def write_folder(folder: Path, lines: list[dict[str, object]], *, images: str = "abc") -> Path:
    for name in images:
        Image.new("RGB", (28, 28)).save(folder / f"{name}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def names_and_texts(rows: list[Row]) -> list[tuple[str, str | None]]:
    return [(row.image.name if row.image else "", row.positive.text) for row in rows]


def test_each_image_is_a_row_with_its_text_in_the_files_order(tmp_path: Path) -> None:
    rows = read_image_folder(write_folder(tmp_path, LINES))
    assert rows[1].source == f"{tmp_path / 'metadata.jsonl'}, a.png"
    assert names_and_texts(rows) == [("b.png", "a red ring"), ("a.png", "a blue cross"), ("c.png", "a star")]
    assert all(row.image is not None and row.image.is_file() for row in rows)
    assert all(row.query.text is None and row.positive.image is None for row in rows)


def test_each_caption_is_a_row_and_the_text_replaces_missing_captions(tmp_path: Path) -> None:
    rows = read_image_folder(write_folder(tmp_path, LINES), captions="captions")
    assert names_and_texts(rows) == [
        ("b.png", "a red ring"),
        ("b.png", "ring, red"),
        ("a.png", "a blue cross"),
        ("a.png", "cross, blue"),
        ("a.png", "one cross"),
        ("c.png", "a star"),
    ]


@pytest.mark.parametrize(("limit", "text_rows", "caption_rows"), [(1, 1, 2), (2, 2, 5), (99, 3, 6)])
def test_the_limit_counts_images_not_captions(tmp_path: Path, limit: int, text_rows: int, caption_rows: int) -> None:
    folder = write_folder(tmp_path, LINES)
    assert len(read_image_folder(folder, limit=limit)) == text_rows
    assert len(read_image_folder(folder, captions="captions", limit=limit)) == caption_rows


def test_a_missing_image_is_an_error_with_file_line_and_name(tmp_path: Path) -> None:
    write_folder(tmp_path, LINES, images="bc")
    place = re.escape(f"{tmp_path / 'metadata.jsonl'}:2")
    with pytest.raises(CocoaError, match=rf"{place}: names 'a\.png'"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({}, "has no 'text'"),
        ({"text": None}, "has no 'text'"),
        ({"text": " \n"}, "has an empty 'text'"),
        ({"captions": "ring"}, "'captions' is 'ring'; expected a list of texts"),
        ({"captions": ["a ring", ""]}, "an entry of 'captions' is empty or not a text"),
        ({"captions": ["a ring", 7]}, "an entry of 'captions' is empty or not a text"),
        *(({"text": f"a ring {token}"}, f"the text contains {re.escape(token)}") for token in RESERVED_TOKENS),
        ({"captions": [f"a {RESERVED_TOKENS[0]}"]}, f"the text contains {re.escape(RESERVED_TOKENS[0])}"),
    ],
)
def test_a_row_with_a_wrong_text_is_an_error_that_names_it(
    tmp_path: Path, line: dict[str, object], message: str
) -> None:
    write_folder(tmp_path, [LINES[0], {"file_name": "a.png", **line}])
    assert len(read_image_folder(tmp_path, limit=1)) == 1
    place = re.escape(f"{tmp_path / 'metadata.jsonl'}, a.png")
    with pytest.raises(CocoaError, match=f"{place}: {message}"):
        read_image_folder(tmp_path, captions="captions")


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, [])
    with pytest.raises(CocoaError, match=r"metadata\.jsonl has no rows"):
        read_image_folder(tmp_path)
