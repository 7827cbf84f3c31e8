"""Tables give the images inside of them, as data sets have them, with the other columns."""

import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from source_files import parquet_file, read
from table_files import png

from cocoa_embed.sources import tables
from cocoa_embed.sources.keys import read_key


def test_rows_are_named_by_their_numbers_and_described_by_the_other_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 4)
    day = datetime.date(2026, 1, 2)
    rows = [
        {
            "image": {"bytes": png(n), "path": f"{n}.png"},
            "caption": f"c {n}",
            "taken": day,
            "x": float("nan"),
            "raw": b"z",
        }
        for n in range(10)
    ]
    rows[3]["image"] = None
    (tmp_path / "rows.parquet").write_bytes(parquet_file(rows))
    found = read(tmp_path / "rows.parquet")
    assert found.contents == {f"rows.parquet#{n}": png(n) for n in range(10) if n != 3}
    assert found.metadata["rows.parquet#7"] == {"text": "c 7", "taken": "2026-01-02", "x": None, "file_name": "7.png"}


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"jpg": png(1), "key": "a"}, ["0"]),
        ({"image": png(1), "mask": png(2)}, ["0:image", "0:mask"]),
        ({"images": [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}]}, ["0", "0[1]"]),
        ({"embedding": b"no image", "image": {"bytes": png(1), "path": None}}, ["0"]),
    ],
)
def test_the_columns_of_images_are_those_that_begin_with_one(
    tmp_path: Path, row: dict[str, Any], names: list[str]
) -> None:
    (tmp_path / "rows.parquet").write_bytes(parquet_file([row]))
    found = read(tmp_path / "rows.parquet")
    assert [*found.contents] == [f"rows.parquet#{name}" for name in names]
    assert not found.faults


def test_cells_without_bytes_and_broken_tables_are_named(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": content, "path": "a.png"}} for content in (png(1), None, b"")]
    (tmp_path / "rows.parquet").write_bytes(parquet_file(rows))
    found = read(tmp_path / "rows.parquet")
    assert len(found.contents) == 1
    assert "has no bytes, only the path 'a.png'" in found.faults[0]
    assert "is empty" in found.faults[1]
    (tmp_path / "none.parquet").write_bytes(parquet_file([{"a": 1, "b": "x"}]))
    assert "has no images (columns: a, b)" in read(tmp_path / "none.parquet").faults[0]
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    assert "rows.parquet: cannot be read" in read(tmp_path / "rows.parquet").faults[0]


def test_a_data_set_that_datasets_has_saved_is_read_without_its_cache(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = [{"image": {"bytes": png(n), "path": None}, "label": n % 2} for n in range(5)]
    data = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(
        tmp_path / "set", num_shards={"train": 2, "test": 1}
    )
    (tmp_path / "set" / "train" / "cache-1.arrow").write_bytes(b"no table")
    found = read(tmp_path / "set")
    assert sorted(found.contents.values()) == sorted([png(0), *(png(n) for n in range(5))])
    assert len(found.versions) == 3
    assert {values["label"] for values in found.metadata.values()} == {0, 1}


def test_a_caption_beside_a_text_that_is_null_is_the_text(tmp_path: Path) -> None:
    rows = [{"image": png(1), "text": text, "caption": "c"} for text in (None, " ", "t")]
    (tmp_path / "rows.parquet").write_bytes(parquet_file([*rows, {"image": png(1), "text": None, "caption": None}]))
    metadata = [*read(tmp_path / "rows.parquet").metadata.values()]
    assert metadata == [{"text": "c"}, {"text": "c"}, {"text": "t", "caption": "c"}, {}]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_of_optional_images_may_begin_empty(tmp_path: Path, suffix: str) -> None:
    """The names of the images of the other column are those of a table without it."""
    count = tables.ROWS_AT_ONCE + 2
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    second = [None] * (count - 2) + [{"bytes": png(2), "path": None}, None]
    mask = pa.array([None] * (count - 1) + [b"no image"])
    columns = {"image": [png(1)] * count, "second": pa.array(second, kind), "mask": mask, "n": range(count)}
    table, place = pa.table({**columns, "n": [*range(count)]}), tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, place)
    else:
        with pa.ipc.new_file(place, table.schema) as writer:
            writer.write_table(table)
    found = read(place)
    names = [f"rows.{suffix}#{name}" for name in (*range(count - 1), f"{count - 2}:second", count - 1)]
    assert [*found.contents] == names
    assert all(read_key(f"{tmp_path}/{name}") == content for name, content in [*found.contents.items()][-3:])
