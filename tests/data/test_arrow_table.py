import os
import pickle
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, Features
from table_files import png, write_table

from cocoa_embed.data.arrow_table import ArrowTable
from cocoa_embed.data.rows import ArrowImage, Row
from cocoa_embed.data.tables import find_files, open_table
from cocoa_embed.errors import ImageError
from cocoa_embed.train.data.rows import load_row_image
from cocoa_embed.train.data.sources import read_subset
from cocoa_embed.train.settings import SourceSettings


def table_rows(path: Path, cells: list[bytes]) -> list[Row]:
    write_table(path, [{"query_image": cell, "positive_text": f"text {n}"} for n, cell in enumerate(cells)])
    return [row for _, row in read_subset("data", SourceSettings(file=str(path))) if isinstance(row, Row)]


def arrow_image(row: Row) -> ArrowImage:
    assert isinstance(row.image, ArrowImage)
    return row.image


def test_images_stay_on_disk_until_they_are_read(tmp_path: Path) -> None:
    size, count = 100_000, 100
    cells = [os.urandom(size) for _ in range(count)]
    before = pa.total_allocated_bytes()
    rows = table_rows(tmp_path / "rows.parquet", cells)
    assert pa.total_allocated_bytes() - before < 2 * size
    assert len(pickle.dumps(arrow_image(rows[0]))) < 5_000
    assert len(pickle.dumps(rows)) < size
    assert [arrow_image(row).read() for row in rows] == cells
    assert pa.total_allocated_bytes() - before < 2 * size


def test_an_image_inside_a_table_is_the_same_in_another_process(tmp_path: Path) -> None:
    images = [arrow_image(row) for row in table_rows(tmp_path / "rows.parquet", [png(1), png(2)])]
    copies = pickle.loads(pickle.dumps(images))
    assert copies == images
    assert [hash(copy) for copy in copies] == [hash(image) for image in images]
    assert [copy.read() for copy in copies] == [png(1), png(2)]
    assert len({str(image) for image in images}) == len(set(images)) == 2


def test_images_of_a_filtered_table_are_those_of_their_rows() -> None:
    features = Features({"image": datasets.Image()})
    table = Dataset.from_list([{"image": {"bytes": png(n), "path": None}} for n in range(6)], features=features)
    inside = ArrowTable("some", table.select([5, 1, 3]).with_format("arrow"))
    assert [values["image"].read() for _, values in inside.read(["image"])] == [png(5), png(1), png(3)]


def test_images_inside_tables_have_the_limits_of_image_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, broken = table_rows(tmp_path / "rows.parquet", [png(), b"no image"])
    (tmp_path / "good.png").write_bytes(png())
    assert load_row_image(arrow_image(good)) == load_row_image(tmp_path / "good.png")
    with pytest.raises(ImageError, match=r"rows\.parquet, row 2, query_image: is not an image"):
        load_row_image(arrow_image(broken))
    monkeypatch.setattr("cocoa_embed.images.load.MAX_IMAGE_BYTES", 20)
    with pytest.raises(ImageError, match=r"rows\.parquet, row 1, query_image: is too large"):
        arrow_image(good).read()


@pytest.mark.parametrize("root", ["", "memory://bracketed"])
def test_a_file_whose_name_looks_like_a_pattern_is_read_itself(tmp_path: Path, root: str) -> None:
    for name, text in {"photos [1]/rows[1].parquet": "right", "photos [1]/rows1.parquet": "wrong"}.items():
        content = write_table(tmp_path / name, [{"text": text}]).read_bytes()
        if root:
            fsspec.filesystem("memory").pipe(f"/bracketed/{name}", content)
    named = [file for file in find_files(f"{root or tmp_path}/photos*/*.parquet") if "rows[1]" in str(file)]
    assert [list(open_table(file).read(["text"])) for file in named] == [[(f"{named[0]}, row 1", {"text": "right"})]]
    if not root:
        assert len(find_files(f"{tmp_path}/photos [1]/*.parquet")) == 2, "a folder that exists is no pattern"


@pytest.mark.parametrize("rows", [0, 2])
def test_a_table_is_read_without_columns_of_types_that_datasets_does_not_know(
    tmp_path: Path, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    maps = pa.map_(pa.string(), pa.int64())
    columns = {"map": pa.array([[("k", 1)]] * rows, maps), "maps": pa.array([[[("k", 1)]]] * rows, pa.list_(maps))}
    table = pa.table({"text": pa.array(["a"] * rows, pa.string()), **columns})
    parquet.write_table(table, tmp_path / "rows.parquet")
    opened = open_table(tmp_path / "rows.parquet")
    assert list(opened.columns) == ["text"]
    assert [values for _, values in opened.read(opened.columns)] == [{"text": "a"}] * rows
    assert "rows.parquet: the columns 'map' (map<" in caplog.text
    assert "'maps' (list<" in caplog.text
