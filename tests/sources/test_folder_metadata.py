import tracemalloc
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from table_files import write_images, write_table

from cocoa_embed.data.image_folder import DescribedImage
from cocoa_embed.sources.base import MOST_LEVELS
from cocoa_embed.sources.image_metadata import FolderMetadata, ImageDescription, ImageMetadata
from cocoa_embed.sources.shard_files import json_values


def described(root: Path, *names: str, faults: list[str] | None = None) -> list[ImageDescription]:
    noted = [] if faults is None else faults
    metadata = ImageMetadata(lambda source, reason: noted.append(f"{Path(source).name}: {reason}"))
    found = [metadata.describe(root / name, root) for name in names for _ in range(2)][::2]
    assert noted == ([] if faults is None else faults)
    return found


def test_text_files_describe_images_that_no_row_gives_a_text(tmp_path: Path) -> None:
    write_images(tmp_path, "abcd")
    write_table(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "a ring"}, {"file_name": "b.png", "n": 1}])
    for name, text in {"a": "another", "b": "a star", "c": "a cross", "d": "0 0.5 0.5 1 1"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    found = described(tmp_path, "a.png", "b.png", "c.png", "d.png")
    expected = [{"text": "a ring"}, {"n": 1, "text": "a star"}, {"text": "a cross"}, {}]
    assert [each.metadata for each in found] == expected
    names = [each.source and Path(each.source).name for each in found]
    assert names == ["metadata.jsonl", "metadata.jsonl", "c.txt", None]
    checked = [{Path(source).name for source in each.checked_sources} for each in found]
    assert checked == [{"metadata.jsonl", *texts} for texts in ((), ("b.txt",), ("c.txt",), ("d.txt",))]


def test_all_captions_of_an_image_are_lines_and_the_first_of_other_columns_counts(tmp_path: Path) -> None:
    write_images(tmp_path / "sub", "ab")
    rows = [{"image": "sub/a.png", "caption": "one", "n": 1}, {"image": "sub/a.png", "caption": "two", "n": 2}]
    write_table(tmp_path / "metadata.jsonl", [*rows, {"image": "sub/b.png", "captions": ["three", "four"]}])
    write_table(tmp_path / "sub" / "metadata.csv", [{"path": "a.png", "text": "five"}])
    first, second = described(tmp_path, "sub/a.png", "sub/b.png")
    assert first.metadata == {"text": "one\ntwo\nfive", "n": 1}
    assert second.metadata == {"text": "three\nfour", "captions": ["three", "four"]}
    (inside,) = described(tmp_path / "sub", "a.png")
    assert inside.metadata == {"text": "five"}, "nothing above the root is read"


def test_integers_of_more_than_64_bits_are_texts_as_qdrant_would_round_them(tmp_path: Path) -> None:
    write_images(tmp_path, "a")
    values = {"most": 2**63 - 1, "list": [{"id": -(2**70)}], "float": 1e300}
    write_table(tmp_path / "metadata.jsonl", [{"file_name": "a.png", **values}])
    expected = {**values, "list": [{"id": "-1180591620717411303424"}]}
    assert described(tmp_path, "a.png")[0].metadata == json_values(values) == expected


def test_bytes_of_a_table_are_null_and_columns_of_unknown_types_do_not_hide_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, "a")
    columns = {"file_name": ["a.png"], "text": ["a ring"], "one": [b"\xff"], "two": [[b"\xff", None]]}
    parts = {"struct": [{"bytes": b"\xff", "path": None}], "inner": [{"a": b"\xff", "b": 1}]}
    unknown = {"map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))}
    parquet.write_table(pa.table({**columns, **parts, **unknown}), tmp_path / "metadata.parquet")
    (found,) = described(tmp_path, "a.png")
    expected = {"one": None, "two": [None, None], "struct": None, "inner": {"a": None, "b": 1}}
    assert found.metadata == {"text": "a ring", **expected}
    assert "metadata.parquet: the columns 'map' (map<string, int64" in caplog.text
    assert json_values({"inner": {"a": b"\xff", "b": 1}}) == {"inner": expected["inner"]}


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"a": value}], ids=["list", "object"])
def test_a_value_of_more_levels_than_qdrant_reads_is_null(tmp_path: Path, wrap: Callable[[object], object]) -> None:
    def nested(levels: int) -> object:
        return reduce(lambda value, _: wrap(value), range(levels), "x")

    write_images(tmp_path, "a")
    values = {"most": nested(MOST_LEVELS), "more": nested(MOST_LEVELS + 1), "deep": nested(800)}
    write_table(tmp_path / "metadata.jsonl", [{"file_name": "a.png", **values}])
    expected = {"most": values["most"], "more": None, "deep": None}
    assert described(tmp_path, "a.png")[0].metadata == json_values(values) == expected


def test_faults_are_reported_once_and_the_other_rows_count(tmp_path: Path) -> None:
    write_images(tmp_path, "ab")
    write_table(tmp_path / "metadata.csv", [{"path": "gone.png", "text": "x"}, {"path": "a.png", "text": "a ring"}])
    (tmp_path / "b.txt").write_bytes(b"Fu\xdf")
    faults: list[str] = []
    first, second = described(tmp_path, "a.png", "b.png", faults=faults)
    assert (first.metadata, second.metadata, first.checked_sources) == ({"text": "a ring"}, {}, frozenset())
    assert [fault.partition(":")[0] for fault in faults] == ["metadata.csv, row 1", "b.txt"]


def test_a_table_under_another_name_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, "a")
    (tmp_path / "captions.tsv").touch()
    described(tmp_path, "a.png")
    assert f"{tmp_path}: 'captions.tsv' is not read: if it describes the images, call it metadata.csv." in caplog.text
    (tmp_path / "captions.tsv").rename(tmp_path / "metadata.json")
    described(tmp_path, "a.png")
    assert f"{tmp_path}: 'metadata.json' is not read: write it as metadata.jsonl" in caplog.text


def test_a_folder_that_is_gone_describes_nothing(tmp_path: Path) -> None:
    assert described(tmp_path, "gone/a.png") == [({}, None, frozenset())]


def test_the_metadata_of_a_large_folder_are_not_in_memory(tmp_path: Path) -> None:
    found = FolderMetadata("metadata.jsonl")
    tracemalloc.start()
    for number in range(100):
        found.add(DescribedImage(f"row {number}", tmp_path / f"{number}.png", {"notes": f"{number}" * 10_000}))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.row(str(tmp_path / "99.png")) == {"notes": "99" * 10_000}
    assert held < 200_000, "2 MB were added"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_null_or_blank_text_does_not_count(tmp_path: Path, kind: str) -> None:
    write_images(tmp_path, "abcd")
    blank = " " if kind == "jsonl" else None
    rows = [
        {"file_name": "a.png", "text": "one", "caption": None, "captions": None},
        {"file_name": "a.png", "text": blank, "caption": None, "captions": None},
        {"file_name": "b.png", "text": blank, "caption": "two", "captions": None},
        {"file_name": "c.png", "text": blank, "caption": blank, "captions": ["three", "four"]},
        {"file_name": "d.png", "text": blank, "caption": None, "captions": None},
    ]
    write_table(tmp_path / f"metadata.{kind}", rows)
    (tmp_path / "d.txt").write_text("five")
    found = described(tmp_path, *(f"{name}.png" for name in "abcd"))
    assert [each.metadata["text"] for each in found] == ["one", "two", "three\nfour", "five"]
    assert not any("caption" in each.metadata for each in found)
