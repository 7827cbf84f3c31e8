import json
import pickle
import re
import socket
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from unicodedata import normalize

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from table_files import Values, png, write_images, write_table

from cocoa_embed.data import arrow_table, places
from cocoa_embed.data.rows import ArrowImage, Item, Row
from cocoa_embed.errors import CocoaError, ImageError, RowError
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.sources import MMEB_COLUMNS, read_subset, source_version
from cocoa_embed.train.settings import SourceSettings

FORMATS = ("jsonl", "csv", "parquet")

parquet.write_table(pa.table({"query_text": pa.array([], pa.string()), "positive_text": []}), buffer := BytesIO())
NO_ROWS = buffer.getvalue()

ROWS: list[Values] = [
    {"query_text": "left of it?", "query_image": "a.png", "positive_text": 'a "cross"\nand', "positive_image": None,
     "negative_text": ["a star", "a ring"], "negative_image": ["", "b.png"]},
    {"query_text": "", "query_image": "b.png", "positive_text": "ein Würfel", "positive_image": "c.png",
     "negative_text": ["[1] is no list"], "negative_image": []},
]  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path, "abc")
    return tmp_path


def read(subset: str = "data", **source: Any) -> list[Row]:
    rows, errors = read_all(subset, **source)
    assert not errors
    return rows


def read_all(subset: str = "data", **source: Any) -> tuple[list[Row], list[RowError]]:
    found = [row for _, row in read_subset(subset, SourceSettings(**source))]
    return [row for row in found if isinstance(row, Row)], [row for row in found if isinstance(row, RowError)]


def content(rows: list[Row]) -> list[tuple[Item, ...]]:
    return [row.items() for row in rows]


# Files


@pytest.mark.parametrize(("kind", "place"), [("jsonl", ":2"), ("csv", ", row 2"), ("parquet", ", row 2")])
def test_every_format_has_the_same_rows(images: Path, kind: str, place: str) -> None:
    rows = read("mine", file=str(write_table(images / f"rows.{kind}", ROWS)))
    assert (rows[1].source, {row.subset for row in rows}) == (f"{images}/rows.{kind}{place}", {"mine"})
    one, other, third = (images / f"{name}.png" for name in "abc")
    assert content(rows) == [
        (Item("left of it?", (one,)), Item('a "cross"\nand'), Item("a star"), Item("a ring", (other,))),
        (Item(images=(other,)), Item("ein Würfel", (third,)), Item("[1] is no list")),
    ]


def test_columns_of_other_names_are_mapped(images: Path) -> None:
    path = write_table(images / "rows.jsonl", [{"q": "find", "pic": "a.png", "hard": "a star", "query_text": "not me"}])
    rows = read(file=str(path), columns={"query_text": "q", "positive_image": "pic", "negative_text": "hard"})
    assert content(rows) == [(Item("find"), Item(images=(images.absolute() / "a.png",)), Item("a star"))]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"query_text": "questions"},
            r"'questions' for query_text \(did you mean 'question'\? known: question, query_",
        ),
        (
            {"query_text": "question"},
            r"no column holds the positive; give columns\.positive_text .*found: question, que",
        ),
        (None, r"no column holds the positive; give columns\.positive_text .*found: question, query_text"),
    ],
)
def test_a_missing_column_is_an_error_with_those_found(
    images: Path, columns: dict[str, str] | None, message: str
) -> None:
    path = write_table(images / "rows.csv", [{"question": "x", "query_text": "y"}])
    with pytest.raises(CocoaError, match=message):
        read(file=str(path), columns=columns)


def test_a_glob_reads_its_files_in_order_up_to_the_limit(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_table(tmp_path / f"{name}.csv", [{"query_text": f"{name}{n}", "positive_text": "x"} for n in range(2)])
    rows = read(file=str(tmp_path / "*.csv"), limit=5, limit_order="first")
    assert [row.query.text for row in rows] == ["a0", "a1", "b0", "b1", "c0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, r"gone\.jsonl does not exist"),
        ("gone-*.parquet", None, r"\*\.parquet does not exist and matches no file; give"),
        ("", None, r"is a folder; give a \.jsonl, \.csv or \.parquet file"),
        ("rows.txt", b"x", r"rows\.txt is not a table"),
        ("broken.parquet", b"PAR1 no table", r"broken\.parquet cannot be read"),
        ("odd.csv", b"query_text,positive_text\n\x81,x\n", r"cannot be read \(it is not UTF-8; save it as UTF-8\)"),
        ("odd.jsonl", b'{"query_text": "\xe9"}', r"cannot be read \(it is not UTF-8; save it as UTF-8\)"),
        ("wide.csv", "query_text".encode("utf-16-le"), r"it holds NUL bytes, as UTF-16 without a byte order mark does"),
        ("twice.csv", b"query_text,query_text\na,b\n", r"read \(its header has the column 'query_text' twice\)"),
        ("open.csv", b'query_text,positive_text\n"a,x\nb,y\n', r"cannot be read \(line 2: unexpected end of data; "),
        ("quote.csv", b'query_text,positive_text\na,b\n"a "big" dog",c\n', r"cannot be read \(line 3: ',' expected "),
        ("empty.jsonl", b"\n", r"empty\.jsonl: no column holds the query"),
        ("header.csv", b"query_text,positive_text\n", r"header\.csv has no rows"),
        ("none.parquet", NO_ROWS, r"none\.parquet has no rows"),
    ],
)
def test_a_file_that_is_no_table_is_an_error(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CocoaError, match=message):
        read(file=str(tmp_path / name))


WRONG_ROWS: dict[str, Values] = {
    "the query is empty (query_text and query_image)": {"query_text": "", "query_image": None},
    "the positive is empty": {"positive_text": " \n", "positive_image": ""},
    "is a URL; download it": {"query_image": "https://example.org/a.png"},
    "is a URL": {"query_image": "data:image/png;base64,AAAA"},
    "it has 3 negative texts and 2 negative images": {"negative_text": ["a", "b", "c"]},
}
WRONG_LINES = {
    "is not JSON": '{"query_text": "a"',
    "is a JSON list": '["a"]',
    "7 is not a text": '{"query_text": 7, "positive_text": "x"}',
    "['a'] is not a text": '{"query_text": ["a"], "positive_text": "x"}',
    "is not the path of an image": '{"query_image": {"path": "a.png"}, "positive_text": "x"}',
    "half of a surrogate pair": '{"query_text": "\\ud800", "positive_text": "x"}',
    "is a JSON int": "7",
}
WRONG_CELLS = {"has 3 cells; the header has 2 columns": "a,b,c", "has 1 cells; the header has 2 columns": "d"}


@pytest.mark.parametrize(
    ("name", "reasons", "first"),
    [
        *((f"rows.{kind}", WRONG_ROWS, place) for kind, place in zip(FORMATS, (":2", *[", row 2"] * 2), strict=True)),
        ("lines.jsonl", WRONG_LINES, ":1"),
        ("cells.csv", WRONG_CELLS, ", row 1"),
    ],
)
def test_rows_that_cannot_be_used_are_named_with_their_reasons(
    images: Path, name: str, reasons: dict[str, Any], first: str
) -> None:
    write_table(images / name, [ROWS[1], *({**ROWS[0], **changes} for changes in WRONG_ROWS.values()), ROWS[0]])
    (images / "lines.jsonl").write_text("\n".join([*WRONG_LINES.values(), json.dumps(ROWS[0])]))
    (images / "cells.csv").write_text("\n".join(["query_text,positive_text", *WRONG_CELLS.values(), "", "e,f"]))
    rows, errors = read_all(file=str(images / name))
    assert rows[-1].items() == (read(file=str(write_table(images / "good.jsonl", [ROWS[0]])))[0].items()
                                if name != "cells.csv" else (Item("e"), Item("f")))  # fmt: skip
    assert errors[0].source == f"{images / name}{first}"
    assert len(errors) == len(reasons)
    assert all(reason in error.reason for error, reason in zip(errors, reasons, strict=True))


def test_relative_image_paths_start_from_the_given_folder(images: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", "x")
    names = ("x.png", str(images / "a.png"))
    path = write_table(tmp_path / "tables.jsonl", [{"query_image": name, "positive_text": "t"} for name in names])
    rows = read(file=str(path), images=tmp_path / "pictures")
    assert [row.image for row in rows] == [tmp_path / "pictures" / "x.png", images / "a.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_files_of_any_european_spreadsheet_are_read(
    tmp_path: Path, encoding: str, delimiter: str, caplog: pytest.LogCaptureFixture
) -> None:
    cells = [["query_text", "positive_text"], ["Où est l'été?", f'"a, b; c{delimiter}"'], ["Größe", "€ 5"]]
    (tmp_path / "rows.csv").write_bytes("\r\n".join(map(delimiter.join, cells)).encode(encoding))
    expected = [(Item("Où est l'été?"), Item(f"a, b; c{delimiter}")), (Item("Größe"), Item("€ 5"))]
    assert content(read(file=str(tmp_path / "rows.csv"))) == expected
    assert [message for message in caplog.messages if "is read as Windows-1252" in message] == caplog.messages
    assert bool(caplog.messages) == (encoding == "cp1252")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_remote_file_is_read_as_a_local_one(images: Path, kind: str) -> None:
    local = write_table(images / f"rows.{kind}", ROWS)
    address = f"memory://{images.name}/rows.{kind}"
    with fsspec.open(address, "wb") as file:
        file.write(local.read_bytes())
    expected = content(read(file=str(local)))
    assert content(read(file=address, images=images)) == expected
    assert content(read(file=f"memory://{images.name}/*.{kind}", images=images)) == expected
    before = source_version("data", SourceSettings(file=address))
    with fsspec.open(address, "wb") as file:
        file.write(local.read_bytes() + b"\n")
    assert source_version("data", SourceSettings(file=address)) != before
    if kind != "parquet":
        ((), errors) = read_all(file=address)
        assert all("give the folder it starts from as data.images" in error.reason for error in errors)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nothing/*.csv", r"memory://nothing/\*\.csv does not exist and matches no file"),
        ("nosuchprotocol://a.csv", r"nosuchprotocol://a\.csv cannot be read \(Protocol not known: nosuchprotocol"),
        ("memory://nothing/a.csv", r"memory://nothing/a\.csv does not exist; give"),
        ("http://127.0.0.1:9/a.csv", r"http://127\.0\.0\.1:9/a\.csv cannot be read \(.+\)\.$"),
    ],
)
def test_a_remote_file_that_cannot_be_read_is_an_error_in_one_sentence(address: str, message: str) -> None:
    with pytest.raises(CocoaError, match=message):
        read(file=address)


def write_shard(path: Path, **members: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name.replace("_", "."))
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))


def test_the_shards_of_a_webdataset_are_one_table(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", a_png=png(1), a_txt=b"one", b_png=png(2), b_txt="zwölf".encode())
    write_shard(tmp_path / "1.tar", c_png=png(3), c_txt=b"three")
    rows = read(webdataset=str(tmp_path / "*.tar"))
    assert [row.query.text for row in rows] == ["one", "zwölf", "three"]
    images = [pickle.loads(pickle.dumps(row.positive.image)) for row in rows]
    assert [image.read() for image in images] == [png(1), png(2), png(3)]
    table = RowTable.write(tmp_path / "rows.arrow", rows)
    assert [image.read() for row in table for image in row.images()] == [png(1), png(2), png(3)]


def test_a_sample_without_its_image_or_its_text_is_a_bad_row(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", a_png=png(1), a_txt=b"one", b_txt=b"two", c_png=png(3), d_png=png(4), d_txt=b"four")
    rows, errors = read_all(webdataset=str(tmp_path / "0.tar"))
    assert [row.query.text for row in rows] == ["one", "four"]
    assert [(error.source, error.reason) for error in errors] == [
        (f"{tmp_path}/0.tar, row 2", "the positive is empty (png)"),
        (f"{tmp_path}/0.tar, row 3", "the query is empty (txt)"),
    ]


def test_images_of_several_suffixes_in_shards_are_one_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_table, "SHARD_MEMBERS", 2)
    first = {"a_jpg": png(1), "a_txt": b"one"}
    write_shard(tmp_path / "0.tar", **first, late_png=png(2), late_txt=b"two", none_txt=b"none")
    write_shard(tmp_path / "1.tar", a_webp=png(3), a_txt=b"three")
    rows, errors = read_all(webdataset=str(tmp_path / "*.tar"))
    found = [(row.query.text, row.positive.image.read()) for row in rows]
    assert found == [("one", png(1)), ("two", png(2)), ("three", png(3))]
    assert [error.reason for error in errors] == ["the positive is empty (image)"]
    write_shard(tmp_path / "2.tar", a_gif=png(1), a_txt=b"one", b_gif=png(2), b_txt=b"two")
    assert [row.positive.image.read() for row in read(webdataset=str(tmp_path / "2.tar"))] == [png(1), png(2)]
    rows, _ = read_all(webdataset=str(tmp_path / "0.tar"), columns={"query_text": "txt", "positive_image": "png"})
    assert [row.query.text for row in rows] == ["two"], "each suffix is a column, too"


def test_a_server_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(CocoaError, match="cannot be read"):
        read(file=f"http://127.0.0.1:{mute.getsockname()[1]}/rows.csv")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a_txt": b"x", "b_txt": b"y"}, r"0\.tar has no images \(files found: txt\)"),
        ({"a_png": png()}, r"0\.tar: no column holds the query; give columns\.query_text .*columns found: .*png"),
    ],
)
def test_a_shard_without_images_or_texts_is_an_error(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_shard(tmp_path / "0.tar", **members)
    with pytest.raises(CocoaError, match=message):
        read(webdataset=str(tmp_path / "0.tar"))


def test_instructions_come_from_a_column_or_are_the_same_for_all(images: Path) -> None:
    rows = [
        {"query_text": "a ring", "query_instruction": "Find:", "positive_image": "a.png", "negative_text": "x"},
        {"query_text": "a star", "query_instruction": "Look for\n", "positive_image": "b.png", "negative_text": ""},
        {"query_text": "a cross", "query_instruction": " ", "positive_image": "c.png", "negative_text": ""},
    ]
    found = read(file=str(write_table(images / "rows.jsonl", rows)), positive_instruction="Represent it:")
    instructions = [(row.query.instruction, row.positive.instruction) for row in found]
    assert instructions == [("Find: ", "Represent it:"), ("Look for\n", "Represent it:"), (None, "Represent it:")]
    assert [row.query.full_text for row in found] == ["Find: a ring", "Look for\na star", "a cross"]
    assert found[0].negatives == (Item("x", (), "Represent it: "),)
    other = write_table(images / "other.jsonl", [{"text": "a ring", "image": "a.png", "query_instruction": "Find:"}])
    assert read(file=str(other))[0].query == Item("a ring", (), "Find: "), "beside columns of other names, too"
    ((), errors) = read_all(file=str(write_table(images / "empty.jsonl", [{**rows[0], "query_text": ""}])))
    assert "the query is empty" in errors[0].reason
    write_table(images / "metadata.jsonl", [{"file_name": "a.png", "text": "a ring"}])
    (row,) = read(folder=images, query_instruction="Describe:", positive_instruction="Caption:")
    assert row.items() == (Item(None, (images / "a.png",), "Describe:"), Item("a ring", (), "Caption: "))


# The MMEB layout

IMAGE = "<|image_1|>"


def mmeb_row(**values: str) -> Values:
    return {**dict.fromkeys(MMEB_COLUMNS.values(), ""), **values}


@pytest.fixture
def mmeb(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", "ab")
    rows = [
        mmeb_row(qry=f"{IMAGE}\nWhat is it?\n", qry_image_path="images/a.png", pos_text="a ring", neg_text="a star"),
        mmeb_row(qry="Find a star.\n", pos_text=f"{IMAGE}\nRepresent it.\n", pos_image_path="images/b.png"),
        mmeb_row(qry=f"{IMAGE}\n", qry_image_path="images/a.png", pos_text=f"Here {IMAGE} is.", neg_text=f"{IMAGE}\n",
                 pos_image_path="images/b.png", neg_image_path="images/a.png"),
        mmeb_row(qry=f"{IMAGE}\nRepresent the given image with the following question: What is it?\n",
                 qry_image_path="images/a.png", pos_text="a cross", neg_text="a star"),
        mmeb_row(qry="Like this", qry_image_path="images/a.png", pos_text="x", neg_image_path="images/b.png"),
        mmeb_row(qry=f"{IMAGE}\nNo image", pos_text="x"),
    ]  # fmt: skip
    write_table(tmp_path / "OK-VQA" / "original-00000-of-00001.parquet", rows)
    write_table(tmp_path / "OK-VQA" / "diverse_instruction-00000-of-00001.parquet", [mmeb_row(qry="q", pos_text="p")])
    return tmp_path


def test_the_mmeb_layout_gives_every_combination_of_text_and_image(mmeb: Path) -> None:
    rows, bad = read_all("OK-VQA", mmeb=str(mmeb))
    one, other = (mmeb.absolute() / "images" / f"{name}.png" for name in "ab")
    assert content(rows) == [
        (Item("What is it?", (one,)), Item("a ring"), Item("a star")),
        (Item("Find a star."), Item("Represent it.", (other,))),
        (Item(images=(one,)), Item("Here is.", (other,)), Item(images=(one,))),
        (Item("What is it?", (one,), "Represent the given image with the following question: "), Item("a cross"),
         Item("a star")),
        (Item("Like this", (one,)), Item("x"), Item(images=(other,))),
    ]  # fmt: skip
    assert {row.subset for row in rows} == {"OK-VQA"}
    assert [row.source.rpartition(", ")[2] for row in bad] == ["row 6"]
    assert [row.reason.split()[-1] for row in bad] == ["path"]


def test_an_mmeb_subset_has_splits_and_may_have_another_name_or_be_the_folder_itself(mmeb: Path) -> None:
    expected, split = [(Item("q"), Item("p"))], "diverse_instruction"
    assert content(read("OK-VQA", mmeb=str(mmeb), split=split)) == expected
    assert content(read("mine", mmeb=str(mmeb), config="OK-VQA", split=split)) == expected
    assert content(read("mine", mmeb=str(mmeb / "OK-VQA"), images=mmeb, split=split)) == expected
    with pytest.raises(CocoaError, match=r"no files of the split 'test' \(known: diverse_instruction, original\)"):
        read("OK-VQA", mmeb=str(mmeb), split="test")
    write_table(mmeb / "OK-VQA" / "train.parquet", [mmeb_row(qry="first", pos_text="p")])
    assert content(read("OK-VQA", mmeb=str(mmeb))) == [(Item("first"), Item("p"))]


def test_an_mmeb_table_may_leave_negatives_out_and_nothing_else(tmp_path: Path) -> None:
    row = mmeb_row(qry="q", pos_text="p")
    del row["neg_text"], row["neg_image_path"]
    write_table(tmp_path / "MSCOCO" / "original.parquet", [row])
    assert content(read(subset="MSCOCO", mmeb=str(tmp_path))) == [(Item("q"), Item("p"))]
    del row["pos_image_path"]
    write_table(tmp_path / "CIRR" / "original.parquet", [row])
    with pytest.raises(CocoaError, match="no column 'pos_image_path'"):
        read(subset="CIRR", mmeb=str(tmp_path))


@pytest.mark.parametrize(
    ("subset", "source", "message"),
    [
        ("OKVQA", {}, r"no subset 'OKVQA' \(did you mean 'OK-VQA'\? known: OK-VQA\)"),
        ("ImageNet-1K", {"mmeb": "TIGER-Lab/MMEB-train"}, r"no subset 'ImageNet-1K' \(did you mean 'ImageNet_1K'\?"),
        ("OK-VQA", {"mmeb": "TIGER-Lab/MMEB-train"}, r"download them, and give their folder as data\.images"),
    ],
)
def test_a_missing_mmeb_source_is_named(mmeb: Path, subset: str, source: Values, message: str) -> None:
    with pytest.raises(CocoaError, match=message):
        read(subset=subset, **{"mmeb": str(mmeb), **source})


def test_mmeb_from_the_hub_falls_back_to_the_original_split(mmeb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def load_dataset(name: str, config: str, *, split: str) -> Dataset:
        opened.append((name, config, split))
        if split == "train":
            raise ValueError("Unknown split \"train\". Should be one of ['original', 'diverse_instruction'].")
        return Dataset.from_list([mmeb_row(qry=f"{IMAGE}\nq", qry_image_path="images/a.png", pos_text="p")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read(subset="VOC2007", mmeb="TIGER-Lab/MMEB-train", images=mmeb)
    assert content(rows) == [(Item("q", (mmeb.absolute() / "images" / "a.png",)), Item("p"))]
    assert opened == [("TIGER-Lab/MMEB-train", "VOC2007", split) for split in ("train", "original")]
    assert rows[0].source == "TIGER-Lab/MMEB-train, VOC2007, original, row 1"


# Data sets


def image_data_set(count: int = 4) -> Dataset:
    features = Features({"text": Value("string"), "picture": datasets.Image(), "others": List(datasets.Image())})
    images = [[{"bytes": png(n + start), "path": f"{n}.png"} for start in (0, 100, 200)] for n in range(count)]
    rows = [{"text": f"number {n}", "picture": first, "others": others} for n, (first, *others) in enumerate(images)]
    return Dataset.from_list(rows, features=features)


COLUMNS = {"query_image": "picture", "positive_text": "text", "negative_image": "others"}


@pytest.mark.parametrize("kind", ["saved", "saved with splits", "files"])
def test_a_data_set_in_a_folder_is_read_with_its_images_left_on_disk(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    if kind == "saved":
        image_data_set().save_to_disk(folder)
    elif kind == "files":
        folder.mkdir()
        image_data_set().to_parquet(folder / "train-00000.parquet")
    else:
        DatasetDict(train=image_data_set(), test=image_data_set(1)).save_to_disk(folder)
    rows = read(hub=str(folder), columns=COLUMNS, limit=3, limit_order="first")
    assert [row.positive.text for row in rows] == ["number 0", "number 1", "number 2"]
    for number, row in enumerate(rows):
        stored = [image for image in row.images() if isinstance(image, ArrowImage)]
        assert [image.read() for image in stored] == [png(number), png(100 + number), png(200 + number)]
        assert [str(image) for image in stored] == [
            f"{folder}, train, row {number + 1}, {column}" for column in ("picture", "others[0]", "others[1]")
        ]


def test_a_data_set_that_cannot_be_loaded_is_an_error_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\n'some/set' on the Hub")

    folder = tmp_path / "set"
    DatasetDict(train=image_data_set(), test=image_data_set(1)).save_to_disk(folder)
    with pytest.raises(CocoaError, match=re.escape(f"{folder} cannot be loaded (no split 'dev'; it has train, test)")):
        read(hub=str(folder), split="dev", columns=COLUMNS)
    with pytest.raises(CocoaError, match=r"The data set .*nowhere cannot be loaded"):
        read(hub=str(tmp_path / "nowhere"), columns=COLUMNS)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CocoaError, match=r"some/set, en cannot be loaded \(Couldn't reach 'some/set' on the Hub\)"):
        read(hub="some/set", config="en", columns=COLUMNS)


def test_relative_paths_in_a_data_set_of_the_hub_are_bad_rows(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Dataset.from_list([{"query_image": "a.png", "positive_text": "x"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    ((), (error,)) = read_all(hub="some/set")
    assert "relative path; give the folder it starts from as data.images" in error.reason
    assert [row.image for row in read(hub="some/set", images=images)] == [images.absolute() / "a.png"]


def test_an_empty_cell_of_images_is_absent_and_a_stored_path_is_a_path(images: Path) -> None:
    path = images / "rows.parquet"
    cells = [{"bytes": png(), "path": "x.png"}, {"bytes": None, "path": "a.png"}, {"bytes": b"", "path": None}, None]
    write_table(path, [{"query_text": "q", "query_image": cell, "positive_text": "p"} for cell in cells])
    rows = read(file=str(path))
    image = rows[0].query.image
    assert isinstance(image, ArrowImage)
    with pytest.raises(ImageError, match=r"rows\.parquet, row 9, query_image: cannot be read"):
        replace(image, row=8).read()
    assert [row.query.image for row in rows[1:]] == [images.absolute() / "a.png", None, None]


def test_the_version_of_a_folder_changes_with_its_text_files_and_images(tmp_path: Path) -> None:
    write_images(tmp_path, "a")
    (tmp_path / "a.txt").write_text("a ring")
    versions = [source_version("data", SourceSettings(folder=tmp_path))]
    (tmp_path / "a.txt").write_text("a star, not a ring")
    versions.append(source_version("data", SourceSettings(folder=tmp_path)))
    write_images(tmp_path / "sub", "b")
    versions.append(source_version("data", SourceSettings(folder=tmp_path)))
    assert len({*map(str, versions)}) == 3
    assert versions[-1] == source_version("data", SourceSettings(folder=tmp_path))


def test_an_image_of_a_table_is_found_however_its_accents_are_composed(tmp_path: Path) -> None:
    write_images(tmp_path, [normalize("NFD", "Café")])
    row = {"query_text": "a ring", "positive_image": normalize("NFC", "Café.png")}
    ((item,),) = ([row.positive.images for row in read(file=str(write_table(tmp_path / "rows.csv", [row])))],)
    assert item == (tmp_path / f"{normalize('NFD', 'Café')}.png",)
