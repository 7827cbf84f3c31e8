from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from scored_model import mmeb_row, write_benchmark, write_mosaics, write_subset

from cocoa_embed.data.rows import Item
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.mmeb_reader import MmebFolder, SubsetData

NAME = "MSCOCO_i2t"


def row(**changed: Any) -> dict[str, Any]:
    return {**mmeb_row("<|image_1|>\nFind it\n", "MSCOCO_i2t/0000.png", ["a", "b"]), **changed}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_mosaics(tmp_path / "images", NAME, 3, 0)
    return tmp_path / "images"


def read(tmp_path: Path, rows: list[dict[str, Any]], shards: int = 1, **options: Any) -> SubsetData:
    write_subset(tmp_path / "data", NAME, rows, shards)
    return MmebFolder(tmp_path / "data", tmp_path / "images", **options).read(NAME)


def test_a_row_becomes_items_without_the_image_token(tmp_path: Path, images: Path) -> None:
    data = read(tmp_path, [
        row(),
        row(qry_text="Look at <|image_1|> here", qry_img_path="MSCOCO_i2t/0001.png", tgt_text=["c", "a", "b"],
            tgt_img_path=["", None, ""]),
        row(qry_text=None, tgt_text=["<|image_1|>\n", "with <|image_1|>"], tgt_img_path=["MSCOCO_i2t/0002.png"] * 2),
        row(qry_img_path=None, qry_text="only text"),
    ])  # fmt: skip
    assert data.queries == [
        Item("Find it", (Path("MSCOCO_i2t/0000.png"),)),
        Item("Look at here", (Path("MSCOCO_i2t/0001.png"),)),
        Item(None, (Path("MSCOCO_i2t/0000.png"),)),
        Item("only text"),
    ]
    image = Path("MSCOCO_i2t/0002.png")
    assert data.targets == [Item("a"), Item("b"), Item("c"), Item(None, (image,)), Item("with", (image,))]
    assert [each.targets.tolist() for each in data.rows] == [[0, 1], [2, 0, 1], [3, 4], [0, 1]]
    assert [each.query for each in data.rows] == [0, 1, 2, 3]
    assert data.rows[1].source.endswith("test-00000-of-00001.parquet, row 2")


def test_shards_are_read_in_order_and_rows_named_by_their_file(tmp_path: Path, images: Path) -> None:
    rows = [row(tgt_text=[f"right {number}", "wrong"]) for number in range(7)]
    data = read(tmp_path, rows, shards=3)
    assert [data.targets[each.targets[0]].text for each in data.rows] == [f"right {number}" for number in range(7)]
    assert data.rows[-1].source.endswith("test-00002-of-00003.parquet, row 3")
    limited = MmebFolder(tmp_path / "data", images, limit=3).read(NAME)
    assert [each.source for each in limited.rows] == [each.source for each in data.rows[:3]]
    assert limited.rows_in_data == 7


def test_missing_files_and_columns_are_named(tmp_path: Path, images: Path) -> None:
    file = write_subset(tmp_path / "data", NAME, [row()] * 3, shards=3) / "test-00001-of-00003.parquet"
    parquet.write_table(pa.Table.from_pylist([{"qry_text": "a", "qry_img_path": "", "pos_text": ["b"]}]), file)
    folder = MmebFolder(tmp_path / "data", images)
    with pytest.raises(CocoaError, match=r"00001.* has no column tgt_text and no tgt_img_path; .* found .*, pos_text"):
        folder.read(NAME)
    file.unlink()
    with pytest.raises(CocoaError, match="MSCOCO_i2t holds 2 of 3 Parquet files"):
        folder.read(NAME)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tgt_text": "a"}, "expected qry_text and qry_img_path as texts, tgt_text and tgt_img_path as equally long"),
        ({"tgt_img_path": [1, 2]}, "found '<|image_1|>\\nFind it\\n', 'MSCOCO_i2t/0000.png', ['a', 'b'], [1, 2]"),
        ({"tgt_img_path": [""]}, "expected"),
        ({"tgt_text": ["a", ""]}, "a candidate has neither a text nor an image"),
        (
            {"qry_img_path": ""},
            "the query: '<|image_1|>\\nFind it\\n' holds <|image_1|>, but the row has no image path",
        ),
        (
            {"tgt_text": ["a", "b", " b "], "tgt_img_path": [""] * 3},
            "two candidates are the same target (the text 'b')",
        ),
    ],
)
def test_a_malformed_row_is_an_error_with_its_source(
    tmp_path: Path, images: Path, changed: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "data" / NAME
    folder.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist([row(**changed)]), folder / "test.parquet")
    with pytest.raises(CocoaError) as caught:
        MmebFolder(tmp_path / "data", images).read(NAME)
    assert "test.parquet, row 1: " in str(caught.value)
    assert message in str(caught.value)


def test_a_target_listed_twice_can_count_once(tmp_path: Path, images: Path) -> None:
    rows = [row(), row(tgt_text=["b", "a", "b", "a"], tgt_img_path=[""] * 4)]
    data = read(tmp_path, rows, merge_repeated_targets=True)
    assert [each.targets.tolist() for each in data.rows] == [[0, 1], [1, 0]], "the first stays the correct one"
    assert data.rows_merged == 1


def test_missing_images_and_a_subset_without_rows_are_errors(tmp_path: Path, images: Path) -> None:
    with pytest.raises(CocoaError, match=r"2 images of MSCOCO_i2t are not in .*images, the first is 'gone.png'"):
        read(tmp_path, [row(tgt_img_path=["gone.png", "a\0b"])])
    with pytest.raises(CocoaError, match=r"1 images of MSCOCO_i2t are not in .*images, the first is '/gone/a.png'"):
        read(tmp_path, [row(qry_img_path="/gone/a.png")])
    with pytest.raises(CocoaError, match="MSCOCO_i2t has no rows"):
        read(tmp_path, [])


def test_subsets_are_found_and_selected_and_wrong_names_and_folders_are_errors(tmp_path: Path) -> None:
    data, images = write_benchmark(tmp_path, 4)
    for name in ("notes", "GQA"):
        (data / name).mkdir()
    folder = MmebFolder(data, images)
    assert folder.subsets() == ["ImageNet-1K", "OK-VQA", "MSCOCO_t2i", "RefCOCO-Matching"]
    assert folder.subsets(["MSCOCO_t2i", "OK-VQA", "OK-VQA"]) == ["OK-VQA", "MSCOCO_t2i"]
    for wrong, selected, message in (
        (folder, ["MSCOCO-t2i"], r"MMEB-V1 has no subset 'MSCOCO-t2i' \(did you mean 'MSCOCO_t2i'\?"),
        (folder, ["GQA"], r"GQA holds no test\*\.parquet \(known: ImageNet-1K"),
        (MmebFolder(tmp_path / "no", images), [], "no does not exist; name the folder that holds the subsets"),
        (MmebFolder(images, images), [], "eval_images holds no subset of MMEB-V1; expected folders of Parquet files"),
    ):
        with pytest.raises(CocoaError, match=message):
            wrong.subsets(selected)
