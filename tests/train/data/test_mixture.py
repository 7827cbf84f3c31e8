from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_files import png, write_images, write_table

from cocoa_embed.errors import CocoaError
from cocoa_embed.train.data.mixture import ReadRows, draw_entries, read_rows, weigh
from cocoa_embed.train.settings import SourceSettings


def write_rows(path: Path, count: int, *, bad: int = 0) -> SourceSettings:
    rows: list[dict[str, Any]] = [{"query_text": f"{path.stem} {n}", "positive_text": "x"} for n in range(count)]
    for row in rows[:bad]:
        row["positive_text"] = ""
    return SourceSettings(file=str(write_table(path, rows)))


def read(sources: dict[str, SourceSettings], **values: Any) -> ReadRows:
    return read_rows(sources, **{"on_bad_row": "stop", "seed": 0, **values})


# Weights and limits


@given(count=st.integers(1, 40), weight=st.floats(0.01, 5) | st.integers(1, 4), seed=st.integers(0, 9))
def test_a_weight_repeats_every_row_as_often_as_it_says(count: int, weight: float, seed: int) -> None:
    rows = np.arange(count) + 100
    weighed = weigh(rows, weight, seed=seed, subset="data").tolist()
    times = Counter(weighed)
    assert abs(len(weighed) - weight * count) <= 0.5 + 1e-9
    assert all(times[row] in (int(weight), int(weight) + 1) for row in rows.tolist())
    assert weighed[: int(weight) * count] == rows.tolist() * int(weight)
    assert weighed[int(weight) * count :] == sorted(set(weighed[int(weight) * count :]) & set(rows.tolist()))


def test_another_seed_or_subset_draws_other_rows_and_other_entries() -> None:
    draws = ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    rows = [weigh(np.arange(200), 0.5, seed=seed, subset=subset).tolist() for seed, subset in draws]
    entries = [draw_entries(200, 100, seed, subset) for seed, subset in draws]
    for first, again, *others in (rows, entries):
        assert len(first) == 100
        assert first == again
        assert first not in others


def test_a_limit_draws_entries_or_takes_the_first_and_paraphrases_stay_with_their_images(tmp_path: Path) -> None:
    write_images(tmp_path, map(str, range(40)))
    lines = [{"file_name": f"{n}.png", "text": str(n), "captions": [f"one {n}", f"two {n}"]} for n in range(40)]
    write_table(tmp_path / "metadata.jsonl", lines)
    source = SourceSettings(folder=tmp_path, captions="captions", paraphrases=1, limit=10)
    drawn, other, first = (
        read({"data": source.model_copy(update={"limit_order": order})}, seed=seed)
        for order, seed in (("random", 0), ("random", 1), ("first", 0))
    )
    names = [list(dict.fromkeys(row.source.split()[-1] for row in found.rows)) for found in (drawn, other, first)]
    assert names[2] == [f"{n}.png" for n in range(10)]
    assert names[0] != names[1] != names[2]
    assert [len(some) for some in names] == [10] * 3
    assert drawn.rows.counts == other.rows.counts == first.rows.counts == {"data": 30}
    assert [int(name[:-4]) for name in names[0]] == sorted(int(name[:-4]) for name in names[0])


def test_bad_entries_outside_of_a_limit_do_not_matter(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 400, bad=4)
    limited = source.model_copy(update={"limit": 200})
    assert len(read({"data": source}, on_bad_row="skip").bad) == 4
    found = read({"data": limited}, on_bad_row="skip", seed=5)
    assert len(found.bad) + len(found.rows) == 200
    assert len(found.bad) < 4


# Reading


def test_rows_come_in_the_order_of_their_subsets_repeated_by_their_weights(tmp_path: Path) -> None:
    sources = {
        "b": write_rows(tmp_path / "b.csv", 4).model_copy(update={"weight": 2.5}),
        "a": write_rows(tmp_path / "a.jsonl", 4),
        "c": write_rows(tmp_path / "c.parquet", 4).model_copy(
            update={"weight": 0.5, "limit": 2, "limit_order": "first"}
        ),
    }
    found = read(sources)
    assert found.rows.counts == {"b": 10, "a": 4, "c": 1} == Counter(row.subset for row in found.rows)
    assert [row.subset for row in found.rows] == ["b"] * 10 + ["a"] * 4 + ["c"]
    assert [row.query.text for row in found.rows[10:14]] == [f"a {n}" for n in range(4)]
    assert found.rows.fingerprint == read(sources).rows.fingerprint
    assert (found.bad, len(found.sizes)) == ([], 0)


def test_one_row_in_a_hundred_of_the_whole_stage_may_be_left_out(tmp_path: Path) -> None:
    bad, good = write_rows(tmp_path / "bad.jsonl", 40, bad=3), write_rows(tmp_path / "good.csv", 260)
    message = r"bad\.jsonl:1: the positive is empty \(positive_text\)\. \(2 more rows .*\) .*data\.on_bad_row=skip"
    with pytest.raises(CocoaError, match=message):
        read({"bad": bad, "good": good})
    found = read({"bad": bad, "good": good}, on_bad_row="skip")
    assert (len(found.rows), found.rows.counts) == (297, {"bad": 37, "good": 260})
    assert [row.subset for row in found.bad] == ["bad"] * 3
    fewer = write_rows(tmp_path / "fewer.csv", 259)
    with pytest.raises(CocoaError, match=r"3 of 299 rows cannot be used; at most 1% .*jsonl:1: .*jsonl:2: .*jsonl:3: "):
        read({"bad": bad, "good": fewer}, on_bad_row="skip")


@pytest.fixture(params=["bad.png", "gone.png"])
def with_images(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, SourceSettings]:
    """A hundred rows of files and a hundred inside a table; one image of each is missing or cannot be decoded."""
    bad = request.param
    write_images(tmp_path, "ab")
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"query_text": "q", "query_image": "a.png", "positive_image": "b.png"}] * 99
    files = write_table(tmp_path / "files.jsonl", [*rows, {**rows[0], "negative_image": ["b.png", bad]}])
    cells = [png(n) for n in range(99)] + [png()[:60]]
    inside = write_table(tmp_path / "inside.parquet", [{"query_image": cell, "positive_text": "p"} for cell in cells])
    return {"files": SourceSettings(file=str(files)), "inside": SourceSettings(file=str(inside))}


def test_rows_whose_images_cannot_be_decoded_are_left_out_or_stop(with_images: dict[str, SourceSettings]) -> None:
    with pytest.raises(CocoaError, match=r"files\.jsonl:100: the image .*(bad\.png is not an|gone\.png does not)"):
        read(with_images)
    found = read(with_images, on_bad_row="skip")
    assert found.rows.counts == {"files": 99, "inside": 99}
    assert [(row.subset, row.source[-4:]) for row in found.bad] == [("files", ":100"), ("inside", " 100")]
    assert "inside.parquet, row 100, query_image is truncated" in found.bad[1].reason
    assert len({image for row in found.rows for image in row.images()}) == 101
    assert {found.sizes[image] for row in found.rows for image in row.images()} == {(56, 56)}


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


def test_a_subset_without_a_usable_row_is_named(scene_folder: Path) -> None:
    sources = {"asked": SourceSettings(folder=scene_folder, captions="questions")}
    with pytest.raises(CocoaError, match=r"Subset 'asked' has no usable row with captions=questions; give it other"):
        read(sources)
