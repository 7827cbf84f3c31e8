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
    assert names_and_texts(rows) == [("b.png", "a red ring"), ("a.png", "a blue cross"), ("c.png", "a star")]
    assert all(row.image is not None and row.image.is_file() for row in rows)
    assert all(row.query.text is None and row.positive.image is None for row in rows)


def test_each_caption_is_a_row_and_the_text_stands_in_where_there_is_none(tmp_path: Path) -> None:
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


def test_a_row_knows_the_file_and_the_image_it_comes_from(tmp_path: Path) -> None:
    row = read_image_folder(write_folder(tmp_path, LINES))[1]
    assert row.source == f"{tmp_path / 'metadata.jsonl'}, a.png"


def test_a_missing_image_is_an_error_with_file_line_and_name(tmp_path: Path) -> None:
    write_folder(tmp_path, LINES, images="bc")
    place = re.escape(f"{tmp_path / 'metadata.jsonl'}:2")
    with pytest.raises(CocoaError, match=rf"{place}: names 'a\.png'"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("line", [{}, {"text": ""}, {"text": " \n"}, {"text": None}])
def test_a_row_without_text_is_an_error_that_names_it(tmp_path: Path, line: dict[str, object]) -> None:
    write_folder(tmp_path, [LINES[0], {"file_name": "a.png", **line}])
    assert len(read_image_folder(tmp_path, limit=1)) == 1
    place = re.escape(f"{tmp_path / 'metadata.jsonl'}, a.png")
    with pytest.raises(CocoaError, match=rf"{place}: has (no|an empty) 'text'"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("captions", [["a red ring", ""], ["a red ring", 7], "ring", 7, {"en": "a red ring"}])
def test_captions_that_are_no_list_of_texts_are_an_error_that_names_the_row(tmp_path: Path, captions: object) -> None:
    write_folder(tmp_path, [{"file_name": "a.png", "text": "a red ring", "captions": captions}])
    with pytest.raises(CocoaError, match=r"metadata\.jsonl, a\.png"):
        read_image_folder(tmp_path, captions="captions")


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, [])
    with pytest.raises(CocoaError, match=r"metadata\.jsonl has no rows"):
        read_image_folder(tmp_path)


def test_the_demos_scenes_are_read_whole(scene_folder: Path, scene_rows: list[Row]) -> None:
    assert [row.image.name for row in scene_rows if row.image] == [f"{index:05d}.png" for index in range(24)]
    assert len(read_image_folder(scene_folder, captions="captions")) == 4 * len(scene_rows)


@pytest.mark.parametrize("token", RESERVED_TOKENS)
@pytest.mark.parametrize("column", ["text", "captions"])
def test_a_text_that_would_be_taken_for_an_image_is_an_error_that_names_the_row(
    tmp_path: Path, token: str, column: str
) -> None:
    text = f"a ring {token} on white"
    line = {"file_name": "0.png", "text": "a ring", column: text if column == "text" else [text]}
    Image.new("RGB", (56, 56)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(CocoaError, match=r"0\.png: the text contains ") as error:
        read_image_folder(tmp_path, captions="captions" if column == "captions" else "text")
    assert token in str(error.value)
