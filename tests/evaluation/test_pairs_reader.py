from pathlib import Path

import pytest
from scored_model import ScoredModel
from table_files import png, write_images, write_table

from cocoa_embed.data.rows import ArrowImage, Item
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.pairs import evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import Pair, read_pairs


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_tables_of_all_kinds_give_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path / "pictures", "abc")
    rows = [{"caption": f"text {name}", "picture": f"pictures/{name}.png", "more": "x"} for name in "abc"]
    table = write_table(tmp_path / f"rows{suffix}", rows)
    columns = {"query_text": "caption", "positive_image": "picture"}
    assert read_pairs(table, None, columns) == [
        Pair(Item(f"text {name}"), Item(None, (tmp_path / "pictures" / f"{name}.png",))) for name in "abc"
    ]
    bare = write_table(tmp_path / f"bare{suffix}", [{**row, "picture": row["picture"][9:]} for row in rows])
    assert read_pairs(bare, tmp_path / "pictures", columns) == read_pairs(table, None, columns)


def test_images_inside_parquet_and_lists_of_captions_are_read(tmp_path: Path) -> None:
    first, second = png(1), png(2)
    rows = [
        {"text": ["a", "b"], "image": {"bytes": first, "path": "x.png"}},
        {"text": ["c", None], "image": {"bytes": second, "path": None}},
        {"text": ["d"], "image": {"bytes": first, "path": "copy.png"}},
    ]
    pairs = read_pairs(write_table(tmp_path / "rows.parquet", rows))
    assert [pair.first.text for pair in pairs] == ["a", "b", "c", "d"]
    images = [pair.second.image for pair in pairs]
    assert [image.read() for image in images if isinstance(image, ArrowImage)] == [first, first, second, first]
    assert images[0] == images[1] == images[3] != images[2], "copies of an image are one item"
    document = evaluate_pairs([Encoder(ScoredModel(), "one")], pairs, resamples=10)
    assert document["counts"]["text_to_image"]["documents"] == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_list_of_texts_is_a_pair_for_each_in_every_kind_of_table(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path, "ab")
    rows = [{"text": ["a dog", "a puppy"], "image": "a.png"}, {"text": ["[sic] a cat"], "image": "b.png"}]
    pairs = read_pairs(write_table(tmp_path / f"rows{suffix}", rows))
    assert [pair.first.text for pair in pairs] == ["a dog", "a puppy", "[sic] a cat"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_text_in_brackets_that_is_no_list_of_texts_stays_as_it_is(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path, "a")
    texts = ["[sic]", "[1987]", "[]", '["a", 3]', "[" * 10000]
    rows = [{"text": text, "image": "a.png"} for text in texts]
    assert [pair.first.text for pair in read_pairs(write_table(tmp_path / f"rows{suffix}", rows))] == texts


def test_pairs_of_any_items_are_read(tmp_path: Path) -> None:
    write_images(tmp_path, "ab")
    rows = [{"query_text": f"change {name}", "query_image": f"{name}.png", "positive_text": name} for name in "ab"]
    (first, _) = read_pairs(write_table(tmp_path / "rows.csv", rows))
    assert first == Pair(Item("change a", (tmp_path / "a.png",)), Item("a"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.csv", r"no column holds the query; give --query-text or --query-image \(columns found: a, b\)"),
        ("empty.jsonl", "has no rows"),
        ("missing.jsonl", r"missing.jsonl:2: the image .*gone.png does not exist"),
        ("gone.csv", "does not exist; name an image folder"),
        ("untitled", r"metadata\.jsonl, a\.png: has no 'text' \(columns found: file_name\)"),
    ],
)
def test_data_that_cannot_be_used_are_an_error_with_the_row_or_the_option(
    tmp_path: Path, name: str, message: str
) -> None:
    write_images(tmp_path / "untitled", "a")
    write_table(tmp_path / "rows.csv", [{"a": "1", "b": "2"}])
    write_table(tmp_path / "empty.jsonl", [])
    write_table(tmp_path / "missing.jsonl", [{"text": "a", "image": each} for each in ("untitled/a.png", "gone.png")])
    write_table(tmp_path / "untitled/metadata.jsonl", [{"file_name": "a.png"}])
    with pytest.raises(CocoaError, match=message):
        read_pairs(tmp_path / name)
