import csv
import json
import math
import weakref
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import COLOURS
from PIL import Image
from scored_model import ScoredModel, mosaic
from table_files import write_images, write_table

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation import pairs as pairs_module
from cocoa_embed.evaluation.embed import Item
from cocoa_embed.evaluation.metrics import METRICS
from cocoa_embed.evaluation.pairs import Pair, directions, evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import PairColumns, read_pairs

NAMES = list(COLOURS)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """An image folder: 20 images, two captions each, one caption that two images share."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for number in range(20):
        mosaic(number, NAMES[number % 4]).save(folder / f"{number}.png")
        captions = [f"{NAMES[number % 4]} number {number}", "the red pair" if number in (4, 8) else f"a {number}th"]
        lines += [json.dumps({"file_name": f"{number}.png", "text": caption}) for caption in captions]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def by_brute_force(model: ScoredModel, folder: Path) -> dict[str, dict[str, float]]:
    """Score an image folder query by query, without anything of the package."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    texts, files = sorted({row["text"] for row in rows}), sorted({row["file_name"] for row in rows})
    pictures = {file: Image.open(folder / file).convert("RGB") for file in files}

    def embed(key: str, encode: Callable[..., np.ndarray]) -> np.ndarray:
        item = {"image": pictures[key]} if key in pictures else {"text": key}
        return encode([item], batch_size=1, show_progress_bar=False)[0].astype(float)

    measured = {}
    for name, queries, documents in (("text_to_image", texts, files), ("image_to_text", files, texts)):
        vectors = {document: embed(document, model.encode_document) for document in documents}
        values: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for query in queries:
            vector = embed(query, model.encode_query)
            order = sorted(documents, key=lambda document: -float(vectors[document] @ vector))
            right = {row[key] for row in rows for key, own in (("file_name", "text"), ("text", "file_name"))
                     if row[own] == query}  # fmt: skip
            places = [place for place, document in enumerate(order, 1) if document in right]
            for cut_off in (1, 5, 10):
                values[f"recall@{cut_off}"].append(sum(place <= cut_off for place in places) / len(right))
                values[f"hit@{cut_off}"].append(float(places[0] <= cut_off))
            values["mrr"].append(1 / places[0])
            best = sum(1 / math.log2(place + 1) for place in range(1, len(right) + 1))
            values["ndcg@10"].append(sum(1 / math.log2(place + 1) for place in places if place <= 10) / best)
        measured[name] = {metric: sum(each) / len(each) for metric, each in values.items()}
    return measured


@pytest.mark.parametrize(("noise", "at_once"), [(30.0, 512), (200.0, 7)])
def test_both_directions_are_those_of_brute_force(
    captioned: Path, noise: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "QUERIES_AT_ONCE", at_once)
    document = evaluate_pairs([Encoder(ScoredModel(noise=noise), "one")], read_pairs(captioned), resamples=50)
    expected = by_brute_force(ScoredModel(noise=noise), captioned)
    assert document["subsets"].keys() == expected.keys() == {"text_to_image", "image_to_text"}
    for direction, metrics in expected.items():
        assert document["subsets"][direction] == pytest.approx(metrics), direction
        assert 0 < metrics["mrr"] < 1
    for metric in METRICS:
        both = [metrics[metric] for metrics in expected.values()]
        assert document["averages"][metric] == pytest.approx(sum(both) / 2)
    assert document["counts"]["text_to_image"] == {"queries": 39, "documents": 20, "groups": 19}
    assert document["counts"]["image_to_text"] == {"queries": 20, "documents": 39, "groups": 19}
    assert document["chance"]["image_to_text"]["recall@10"] == pytest.approx(10 / 39)
    assert document["chance"]["text_to_image"]["hit@1"] == pytest.approx((38 * 1 / 20 + 2 / 20) / 39)


def test_captions_of_an_image_and_images_of_a_caption_are_all_relevant() -> None:
    a, b, c = (Item(image=name) for name in "abc")
    x, y, z = (Item(name) for name in "xyz")
    there, back = directions([Pair(x, a), Pair(y, a), Pair(y, b), Pair(z, c), Pair(z, c)])
    assert (there.name, back.name) == ("text_to_image", "image_to_text")
    assert [each.tolist() for each in there.relevant] == [[0], [0, 1], [2]]
    assert [each.tolist() for each in back.relevant] == [[0, 1], [1], [2]]
    assert there.groups[0] == there.groups[1] != there.groups[2]
    assert back.groups[0] == back.groups[1] != back.groups[2]


def test_directions_are_named_by_what_is_in_them() -> None:
    text, image, both = Item("a"), Item(None, "b"), Item("a", "b")
    assert [each.name for each in directions([Pair(text, both), Pair(Item("c"), Item("c", "d"))])] == [
        "text_to_image_and_text", "image_and_text_to_text"
    ]  # fmt: skip
    assert [each.name for each in directions([Pair(text, Item("b")), Pair(Item("c"), Item("d"))])] == [
        "first_to_second", "second_to_first"
    ]  # fmt: skip
    assert directions([Pair(text, image), Pair(both, Item(None, "d"))])[0].name == "mixed_to_image"
    with pytest.raises(CocoaError, match="2 pairs hold only one query or one document"):
        directions([Pair(text, image), Pair(Item("c"), image)])


def test_intervals_hold_the_scores_and_a_seed_gives_the_same(captioned: Path) -> None:
    pairs = read_pairs(captioned)
    model = Encoder(ScoredModel(noise=100.0), "one")
    document = evaluate_pairs([model], pairs, seed=3)
    for direction, metrics in document["subsets"].items():
        for metric, value in metrics.items():
            low, high = document["intervals"][direction][metric]
            assert 0 <= low <= value <= high <= 1
        low, high = document["intervals"][direction]["mrr"]
        assert high - low > 0.02
    assert evaluate_pairs([model], pairs, seed=3) == document
    assert evaluate_pairs([model], pairs, seed=4)["intervals"] != document["intervals"]
    assert json.loads(json.dumps(document)) == document


def test_two_models_are_compared_on_the_same_queries(captioned: Path) -> None:
    pairs = read_pairs(captioned)
    good, bad = ScoredModel(noise=10.0), ScoredModel(seed=1, noise=10_000.0)
    document = evaluate_pairs([Encoder(good, "good"), Encoder(bad, "bad")], pairs)
    for direction, compared in document["comparison"].items():
        ours, theirs = document["subsets"][direction], document["other"]["subsets"][direction]
        for metric, found in compared.items():
            assert found["difference"] == pytest.approx(ours[metric] - theirs[metric])
            assert found["low"] <= found["difference"] <= found["high"]
        assert compared["mrr"]["p"] < 0.05
        assert compared["mrr"]["low"] > 0
    assert document["other"]["model"] == "bad"
    alone = evaluate_pairs([Encoder(bad, "bad")], pairs)
    assert {key: alone[key] for key in document["other"]} == document["other"]
    same = evaluate_pairs([Encoder(good, "a"), Encoder(good, "b")], pairs)["comparison"]
    assert {(each["difference"], each["p"]) for compared in same.values() for each in compared.values()} == {(0.0, 1.0)}


def test_the_first_model_is_gone_before_the_second_is_loaded(captioned: Path) -> None:
    loaded: list[weakref.ref[ScoredModel]] = []

    def load(seed: int) -> Encoder:
        assert not [reference for reference in loaded if reference() is not None]
        model = ScoredModel(seed)
        loaded.append(weakref.ref(model))
        return Encoder(model, str(seed))

    evaluate_pairs((load(seed) for seed in range(2)), read_pairs(captioned), resamples=10)
    assert len(loaded) == 2


def test_a_model_that_cannot_embed_the_pairs_is_refused(captioned: Path) -> None:
    with pytest.raises(CocoaError, match="words does not embed image; these pairs need a model that does"):
        evaluate_pairs([Encoder(ScoredModel(modalities=("text",)), "words")], read_pairs(captioned))


# Reading


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_tables_of_all_kinds_give_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path / "pictures", "abc")
    rows = [{"caption": f"text {name}", "picture": f"pictures/{name}.png", "more": "x"} for name in "abc"]
    table = write_table(tmp_path / f"rows{suffix}", rows)
    columns = PairColumns(query_text="caption", positive_image="picture")
    assert read_pairs(table, None, columns) == [
        Pair(Item(f"text {name}"), Item(None, str(tmp_path / "pictures" / f"{name}.png"))) for name in "abc"
    ]
    bare = write_table(tmp_path / f"bare{suffix}", [{**row, "picture": row["picture"][9:]} for row in rows])
    assert read_pairs(bare, tmp_path / "pictures", columns) == read_pairs(table, None, columns)


@pytest.mark.parametrize(
    "names",
    [("text", "image"), ("text", "file_name"), ("caption", "image"), ("query_text", "positive_image")],
)
def test_columns_of_common_names_need_not_be_named(tmp_path: Path, names: tuple[str, str]) -> None:
    write_images(tmp_path, "ab")
    table = write_table(tmp_path / "rows.jsonl", [{names[0]: name, names[1]: f"{name}.png"} for name in "ab"])
    assert [pair.first.text for pair in read_pairs(table)] == ["a", "b"]


def test_images_inside_parquet_and_lists_of_captions_are_read(tmp_path: Path) -> None:
    first, second = png(mosaic(1)), png(mosaic(2))
    rows = [
        {"text": ["a", "b"], "image": {"bytes": first, "path": "x.png"}},
        {"text": ["c", None], "image": {"bytes": second, "path": None}},
    ]
    table = write_table(tmp_path / "rows.parquet", rows)
    assert read_pairs(table) == [
        Pair(Item("a"), Item(None, first)), Pair(Item("b"), Item(None, first)), Pair(Item("c"), Item(None, second))
    ]  # fmt: skip
    plain = write_table(tmp_path / "plain.parquet", [{"text": "a", "image": first}, {"text": "b", "image": second}])
    document = evaluate_pairs([Encoder(ScoredModel(), "one")], read_pairs(plain), resamples=10)
    assert document["counts"]["text_to_image"]["documents"] == 2


def test_pairs_of_any_items_are_read(tmp_path: Path) -> None:
    write_images(tmp_path, "ab")
    rows = [{"query_text": f"change {name}", "query_image": f"{name}.png", "positive_text": name} for name in "ab"]
    (first, _) = read_pairs(write_table(tmp_path / "rows.csv", rows))
    assert first == Pair(Item("change a", str(tmp_path / "a.png")), Item("a"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "image": "gone.png"}, "rows.jsonl:2: image names 'gone.png', which is not in"),
        ({"text": "", "image": "a.png"}, "rows.jsonl:2: nothing is in text"),
        ({"text": "a"}, "rows.jsonl:2: nothing is in image"),
        ({"text": 5, "image": "a.png"}, "rows.jsonl:2: text holds a int; expected text"),
        ({"text": "a", "image": 5}, "rows.jsonl:2: image holds a int; expected the path of an image"),
    ],
)
def test_what_is_wrong_with_a_row_is_told_with_its_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_images(tmp_path, "a")
    table = write_table(tmp_path / "rows.jsonl", [{"text": "a", "image": "a.png"}, row])
    with pytest.raises(CocoaError, match=message):
        read_pairs(table)


def test_what_is_wrong_with_a_table_is_told(tmp_path: Path) -> None:
    table = write_table(tmp_path / "rows.csv", [{"a": "1", "b": "2"}])
    for columns, message in (
        (None, r"which columns are pairs is not clear \(found are a, b\); name one for each side with --query-text"),
        (PairColumns(query_text="a"), "which columns are pairs is not clear"),
        (PairColumns(query_text="a", positive_image="c"), "rows.csv has no column c; found are a, b"),
    ):
        with pytest.raises(CocoaError, match=message):
            read_pairs(table, None, columns)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "broken.parquet").write_text("nothing")
    (tmp_path / "list.jsonl").write_text("[]")
    (tmp_path / "rows.txt").touch()
    with (tmp_path / "short.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "image"], ["a"]])
    for name, message in {
        "empty.jsonl": "has no rows",
        "broken.jsonl": "broken.jsonl:1 is not JSON",
        "broken.parquet": "broken.parquet cannot be read",
        "list.jsonl": "list.jsonl:1 is a JSON list",
        "rows.txt": "is not a table; expected .jsonl or .csv or .parquet",
        "short.csv": "row 1 has 1 cells; the header has 2 columns",
        "gone.csv": "does not exist; name an image folder",
    }.items():
        with pytest.raises(CocoaError, match=message):
            read_pairs(tmp_path / name)


def test_an_image_folder_needs_a_text_for_each_image_and_no_columns(captioned: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is an image folder"):
        read_pairs(captioned, None, PairColumns(query_text="text"))
    (captioned / "metadata.jsonl").write_text('{"file_name": "3.png"}\n')
    with pytest.raises(CocoaError, match=r"metadata\.jsonl has no text for '3\.png'"):
        read_pairs(captioned)
    with pytest.raises(CocoaError, match=r"has no metadata\.jsonl"):
        read_pairs(tmp_path)
