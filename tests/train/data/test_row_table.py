"""Rows come back from a table as they went in; its columns and its fingerprint identify content."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_embed.data.arrow_table import open_parquet
from cocoa_embed.data.rows import ArrowImage, Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.train.data.row_table import RowTable, image_id
from cocoa_embed.train.stages.rendering import row_images

texts = st.none() | st.text(min_size=1, max_size=5)
images = st.lists(st.sampled_from([Path("/a.png"), Path("/b.png"), Path("/c.png")]), max_size=2).map(tuple)
items = st.tuples(texts, images, texts).filter(lambda parts: parts[0] or parts[1]).map(lambda parts: Item(*parts))
rows = st.builds(Row, items, items, st.text(max_size=3), st.lists(items, max_size=2).map(tuple), st.sampled_from("ab"))


@given(st.lists(rows, max_size=5), st.data())
def test_rows_come_back_as_they_went_in(given_rows: list[Row], data: st.DataObject) -> None:
    table = RowTable.of(given_rows)
    assert list(table) == given_rows
    places = data.draw(st.lists(st.integers(0, len(given_rows) - 1), max_size=6)) if given_rows else []
    chosen = table.select(np.array(places))
    assert list(chosen) == [given_rows[place] for place in places]
    assert list(chosen[1:]) == list(chosen)[1:]
    contents = [replace(row, source="") for row in given_rows]  # where a row is from is not part of the fingerprint
    assert (chosen.fingerprint == table.fingerprint) == ([contents[place] for place in places] == contents)


@given(st.lists(rows, min_size=2, max_size=4))
def test_columns_identify_content(given_rows: list[Row]) -> None:
    table = RowTable.of(given_rows)
    sides = [(row.query.full_text, row.query.images) for row in given_rows]
    ids = table.column("query_id")
    assert [[a == b for b in sides] for a in sides] == (ids[:, None] == ids[None, :]).tolist()
    assert [table.subsets[subset] for subset in table.column("subset")] == [row.subset for row in given_rows]
    assert (table.column("image_id") == 0).tolist() == [row.image is None for row in given_rows]
    assert table.column("images").tolist() == [len(row.query.images + row.positive.images) for row in given_rows]
    assert table.column("positive_text").tolist() == [len(row.positive.text or "") for row in given_rows]


@given(st.lists(rows, max_size=5), st.data())
def test_images_are_found_once_and_rows_by_their_images_whose_values_are_summed(
    given_rows: list[Row], data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, len(given_rows) - 1), max_size=6)) if given_rows else []
    table = RowTable.of(given_rows).select(np.array(places))
    found = list(table.images(table.image_ids()))
    assert [number for number, _ in table.images(table.image_ids()[:1])] == table.image_ids()[:1].tolist()
    assert sorted(image for _, image in found) == sorted({image for row in table for image in row.images()})
    assert [image_id(image) for _, image in found] == [number for number, _ in found]
    of_a = table.with_images(np.array([image_id(Path("/a.png"))]))
    assert of_a.tolist() == [Path("/a.png") in row.images() for row in table]
    for values in ({}, {"/a.png": 2, "/b.png": 7}):
        of_id = sorted((image_id(Path(name)), value) for name, value in values.items())
        sums = table.image_sums(*np.array(of_id, np.int64).reshape(-1, 2).T)
        assert sums.tolist() == [sum(values.get(str(image), 0) for image in row_images(row)) for row in table]


def test_a_pickled_table_opens_its_file_again(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": [b"one", b"two"]}), tmp_path / "images.parquet")
    inside = open_parquet(tmp_path / "images.parquet")
    given_rows = [
        Row(Item(images=(ArrowImage(inside, number, "image"),)), Item(f"text {number}"), f"row {number}")
        for number in range(2)
    ]
    table = RowTable.write(tmp_path / "rows.arrow", given_rows).select(np.array([1, 1, 0]))
    sent = pickle.dumps(table)
    assert len(sent) < 1000
    (tmp_path / "rows.arrow").rename(tmp_path / "moved.arrow")
    with pytest.raises(CocoaError, match=r"rows\.arrow no longer exist.*COCOA_CACHE"):
        pickle.loads(sent)
    (tmp_path / "moved.arrow").rename(tmp_path / "rows.arrow")
    received = pickle.loads(sent)
    assert list(received) == [given_rows[1], given_rows[1], given_rows[0]]
    assert [image.read() for row in received for image in row.images()] == [b"two", b"two", b"one"]


def test_the_fingerprint_is_that_of_the_content_and_the_same_in_every_release() -> None:
    """Otherwise no run could be resumed, and the held-out rows of no checkpoint could be found."""
    negative = Item(images=(Path("/b.png"),))
    row = Row(Item("a ring", (Path("/a.png"),)), Item("é"), "rows.csv, row 1", (negative,), "mine")
    found = RowTable.of([row, row.reversed()]).fingerprint
    assert found == "47b2029e4b2f63094b455f2cb90c11f252c979e735fb269cd35e0ff03eb4782c"
    changes: list[dict[str, Any]] = [{"query": negative}, {"positive": Item("e")}, {"negatives": ()}, {"subset": "m"}]
    others = [RowTable.of([changed, changed.reversed()]) for changed in (replace(row, **each) for each in changes)]
    assert len({found, *(table.fingerprint for table in others)}) == 5
    elsewhere = replace(row, source="there")
    assert RowTable.of([elsewhere, elsewhere.reversed()]).fingerprint == found


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    RowTable.write(tmp_path / "rows.arrow", [])
    written = tmp_path / "rows.json"
    written.write_text(written.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(ValueError, match="version 0; expected 1"):
        RowTable.open(tmp_path / "rows.arrow")
