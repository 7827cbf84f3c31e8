from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_files import png, write_images, write_table

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.train.data.mixture import ReadRows, fingerprint, read_rows, weigh
from cocoa_embed.train.settings import SourceSettings


def text_rows(count: int) -> list[Row]:
    return [Row(Item(f"query {n}"), Item(f"positive {n}"), source=str(n)) for n in range(count)]


def write_rows(path: Path, count: int, *, bad: int = 0) -> SourceSettings:
    rows: list[dict[str, Any]] = [{"query_text": f"{path.stem} {n}", "positive_text": "x"} for n in range(count)]
    for row in rows[:bad]:
        row["positive_text"] = ""
    return SourceSettings(file=str(write_table(path, rows)))


def read(sources: dict[str, SourceSettings], **values: Any) -> ReadRows:
    return read_rows(sources, **{"on_bad_row": "stop", "seed": 0, **values})


# Weights


@given(count=st.integers(1, 40), weight=st.floats(0.01, 5) | st.integers(1, 4), seed=st.integers(0, 9))
def test_a_weight_repeats_every_row_as_often_as_it_says(count: int, weight: float, seed: int) -> None:
    rows = text_rows(count)
    weighed = weigh(rows, weight, seed=seed, subset="data")
    times = Counter(row.source for row in weighed)
    assert abs(len(weighed) - weight * count) <= 0.5 + 1e-9
    assert set(weighed) <= set(rows)
    assert all(times[row.source] in (int(weight), int(weight) + 1) for row in rows)
    assert weighed[: int(weight) * count] == rows * int(weight)
    tail = [int(row.source) for row in weighed[int(weight) * count :]]
    assert tail == sorted(tail)
    assert weighed == weigh(rows, weight, seed=seed, subset="data")


def test_another_seed_or_subset_draws_other_rows() -> None:
    rows = text_rows(200)
    halves = [weigh(rows, 0.5, seed=seed, subset=subset) for seed, subset in ((0, "a"), (1, "a"), (0, "b"))]
    assert [len(half) for half in halves] == [100] * 3
    assert halves[0] not in halves[1:]


# The fingerprint


def test_the_fingerprint_depends_on_content_and_order_and_not_on_the_source() -> None:
    a, b, c = (Item(images=(Path(f"{name}.png"),)) for name in "abc")
    row = Row(replace(a, text="a"), Item("b"), "here", (c,))
    changes: list[dict[str, Any]] = [{"query": Item("a")}, {"query": a}, {"query": replace(b, text="a")},
                                     {"positive": Item("c")}, {"negatives": ()}, {"negatives": (Item("c.png"),)},
                                     {"subset": "mine"}]  # fmt: skip
    rows = [row, *(replace(row, **change) for change in changes)]
    orders = (*([each] for each in rows), rows[:2], rows[1::-1], [])
    assert len({fingerprint(some) for some in orders}) == len(orders)
    assert fingerprint(rows) == fingerprint([replace(each, source="there") for each in rows])


def test_the_fingerprint_is_the_same_in_every_release() -> None:
    """Otherwise no run could be resumed, and the held-out rows of no checkpoint could be found."""
    negative = Item(images=(Path("/b.png"),))
    row = Row(Item("a ring", (Path("/a.png"),)), Item("é"), "rows.csv, row 1", (negative,), "mine")
    assert fingerprint([row, row.reversed()]) == "38d5dab71dd3f990fb7e22d4983fa6c1b726e7df1a0b2af9c42bd8fd0a3ccecb"


# Reading


def test_rows_come_in_the_order_of_their_subsets_repeated_by_their_weights(tmp_path: Path) -> None:
    sources = {
        "b": write_rows(tmp_path / "b.csv", 4).model_copy(update={"weight": 2.5}),
        "a": write_rows(tmp_path / "a.jsonl", 4),
        "c": write_rows(tmp_path / "c.parquet", 4).model_copy(update={"weight": 0.5, "limit": 2}),
    }
    found = read(sources)
    assert found.counts == {"b": 10, "a": 4, "c": 1} == Counter(row.subset for row in found.rows)
    assert [row.subset for row in found.rows] == ["b"] * 10 + ["a"] * 4 + ["c"]
    assert [row.query.text for row in found.rows[10:14]] == [f"a {n}" for n in range(4)]
    assert found.fingerprint == fingerprint(found.rows) == read(sources).fingerprint
    assert (found.bad, found.sizes) == ([], {})


def test_one_row_in_a_hundred_of_the_whole_stage_may_be_left_out(tmp_path: Path) -> None:
    bad, good = write_rows(tmp_path / "bad.jsonl", 40, bad=3), write_rows(tmp_path / "good.csv", 260)
    message = r"bad\.jsonl:1: the positive is empty \(positive_text\)\. \(2 more rows .*\) .*data\.on_bad_row=skip"
    with pytest.raises(CocoaError, match=message):
        read({"bad": bad, "good": good})
    found = read({"bad": bad, "good": good}, on_bad_row="skip")
    assert (len(found.rows), found.counts) == (297, {"bad": 37, "good": 260})
    assert [row.subset for row in found.bad] == ["bad"] * 3
    fewer = write_rows(tmp_path / "fewer.csv", 259)
    with pytest.raises(CocoaError, match=r"3 of 299 rows cannot be used; at most 1% .*jsonl:1: .*jsonl:2: .*jsonl:3: "):
        read({"bad": bad, "good": fewer}, on_bad_row="skip")


@pytest.fixture
def with_images(tmp_path: Path) -> dict[str, SourceSettings]:
    """A hundred rows of files and a hundred inside a table; one image of each cannot be decoded."""
    write_images(tmp_path, "ab")
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"query_text": "q", "query_image": "a.png", "positive_image": "b.png"}] * 99
    files = write_table(tmp_path / "files.jsonl", [*rows, {**rows[0], "negative_image": ["b.png", "bad.png"]}])
    cells = [png(n) for n in range(99)] + [png()[:60]]
    inside = write_table(tmp_path / "inside.parquet", [{"query_image": cell, "positive_text": "p"} for cell in cells])
    return {"files": SourceSettings(file=str(files)), "inside": SourceSettings(file=str(inside))}


def test_rows_whose_images_cannot_be_decoded_are_left_out_or_stop(with_images: dict[str, SourceSettings]) -> None:
    with pytest.raises(CocoaError, match=r"files\.jsonl:100: the image .*bad\.png is not an image"):
        read(with_images)
    found = read(with_images, on_bad_row="skip")
    assert found.counts == {"files": 99, "inside": 99}
    assert [(row.subset, row.source[-4:]) for row in found.bad] == [("files", ":100"), ("inside", " 100")]
    assert "bad.png is not an image" in found.bad[0].reason
    assert "inside.parquet, row 100, query_image is truncated" in found.bad[1].reason
    assert set(found.sizes.values()) == {(56, 56)}
    assert set(found.sizes) == {image for row in found.rows for image in row.images()}


def test_the_paraphrases_of_a_broken_image_stay(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(200)]
    write_images(tmp_path, (name[:-4] for name in names))
    lines = [{"file_name": name, "text": "x", "captions": [f"one {name}", f"two {name}"]} for name in names]
    write_table(tmp_path / "metadata.jsonl", lines)
    (tmp_path / "7.png").write_bytes(b"no image")
    sources = {"data": SourceSettings(folder=tmp_path, captions="captions", paraphrases=1)}
    before = read(sources, on_bad_row="skip")
    assert len(before.bad) == 2
    assert [row.image for row in before.rows if row.source.endswith(" 7.png")] == [None]


def test_a_weight_that_leaves_no_row_is_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.csv", 4).model_copy(update={"weight": 0.1})
    with pytest.raises(CocoaError, match=r"Subset 'few' has 4 usable rows.* 0\.1"):
        read({"few": source})
