from pathlib import Path

import pytest
from table_files import Values, write_images, write_table

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, RowError
from cocoa_embed.train.data.caption_rows import read_captions, read_image_folder

LINES: list[Values] = [
    {"file_name": "b.png", "text": "a red ring", "captions": ["a red ring", "ring, red"]},
    {"file_name": "a.png", "text": "a blue cross", "captions": ["a blue cross", "cross, blue", "one cross"]},
    {"file_name": "c.png", "text": "a star"},
]


def write_folder(folder: Path, lines: list[Values], *, images: str = "abc") -> Path:
    write_images(folder, images)
    write_table(folder / "metadata.jsonl", lines)
    return folder


def names_and_texts(rows: list[Row]) -> list[tuple[str, str | None]]:
    assert all(row.query.text is None and row.positive.image is None for row in rows)
    return [(row.image.name, row.positive.text) for row in rows if isinstance(row.image, Path)]


def test_each_text_or_each_caption_is_a_row_and_the_limit_counts_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LINES)
    rows = read_image_folder(folder)
    assert names_and_texts(rows) == [("b.png", "a red ring"), ("a.png", "a blue cross"), ("c.png", "a star")]
    assert (rows[1].source, rows[1].image) == (f"{tmp_path / 'metadata.jsonl'}, a.png", tmp_path / "a.png")
    captions = [(line["file_name"], text) for line in LINES for text in line.get("captions", [line["text"]])]
    assert names_and_texts(read_image_folder(folder, captions="captions")) == captions
    limited = [read_image_folder(folder, captions="captions", limit=limit) for limit in (1, 2, 99)]
    assert [names_and_texts(rows) for rows in limited] == [captions[:2], captions[:5], captions]


def test_bad_images_are_errors_and_change_no_paraphrases_of_others(tmp_path: Path) -> None:
    lines = [{"file_name": f"{name}.png", "text": name, "captions": ["one", "two", "three"]} for name in "abcd"]
    whole = read_image_folder(write_folder(tmp_path, lines, images="abcd"), paraphrases=2)
    (tmp_path / "b.png").unlink()
    write_folder(tmp_path, [*lines[:2], {**lines[2], "text": ""}, lines[3]], images="")
    numbers, found = zip(*read_captions(tmp_path, "text", 2), strict=True)
    assert numbers == (0, 0, 0, 1, 2, 3, 3, 3)
    assert [row for row in found if isinstance(row, Row)] == [row for row in whole if row.source[-5] in "ad"]
    errors = [row.source for row in found if isinstance(row, RowError)]
    assert errors == [f"{tmp_path}/metadata.jsonl:2", f"{tmp_path}/metadata.jsonl, c.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({}, "has no 'text'"),
        ({"text": None}, "has no 'text'"),
        ({"text": " \n"}, "has an empty 'text'"),
        ({"captions": "ring"}, "'captions' is 'ring'; expected a list of texts"),
        ({"captions": ["a ring", ""]}, "an entry of 'captions' is empty or not a text"),
        ({"captions": ["a ring", 7]}, "an entry of 'captions' is empty or not a text"),
    ],
)
def test_a_row_with_a_wrong_text_is_an_error_that_names_it(tmp_path: Path, line: Values, message: str) -> None:
    write_folder(tmp_path, [LINES[0], {"file_name": "a.png", **line}])
    with pytest.raises(RowError) as raised:
        read_image_folder(tmp_path, captions="captions")
    assert str(raised.value).startswith(f"{tmp_path / 'metadata.jsonl'}, a.png: {message}")


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match=r"metadata\.jsonl has no rows"):
        read_image_folder(write_folder(tmp_path, []))


def test_text_files_beside_images_are_captions_of_a_folder_without_metadata(tmp_path: Path) -> None:
    write_images(tmp_path / "sub", "ab")
    write_images(tmp_path / "@eaDir", "c")
    for name, text in {"sub/a": "a <|image_pad|> ring", "sub/b": "a star", "@eaDir/c": "none"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    rows = read_image_folder(tmp_path, captions="captions", paraphrases=1)
    assert names_and_texts(rows) == [("a.png", "a <|image_pad|> ring"), ("b.png", "a star")]
    (tmp_path / "sub" / "b.txt").unlink()
    with pytest.raises(RowError, match=r"b\.png: has no caption in b\.txt next to it"):
        read_image_folder(tmp_path)


def test_each_question_of_an_image_is_a_row_with_its_answer(tmp_path: Path) -> None:
    asked = [{"question": "Which shape?", "answer": "A ring."}, {"question": "Red?", "answer": "Yes."}]
    lines = [{"file_name": "a.png", "text": "a ring", "questions": asked}, {"file_name": "b.png", "text": "a cross"}]
    folder = write_folder(tmp_path, lines)
    rows = [row for _, row in read_captions(folder, "questions", 0, instructions={"query": "Answer:"})]
    assert [row.query.image.name for row in rows] == ["a.png", "a.png"]
    assert [(row.query.full_text, row.positive.full_text) for row in rows] == [
        ("Answer: Which shape?", "A ring."),
        ("Answer: Red?", "Yes."),
    ]


@pytest.mark.parametrize("questions", ["Red?", [{"question": "Red?"}], [{"question": "Red?", "answer": " "}], [7], 7])
def test_questions_of_another_form_are_errors_that_name_the_image(tmp_path: Path, questions: object) -> None:
    folder = write_folder(tmp_path, [{"file_name": "a.png", "text": "a ring", "questions": questions}])
    with pytest.raises(RowError, match=r"a\.png: an entry of 'questions' is not"):
        read_image_folder(folder, captions="questions")
