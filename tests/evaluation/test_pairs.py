import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import COLOURS
from PIL import Image
from scored_model import ScoredModel, write_captioned

from cocoa_embed.data.rows import Item
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation import pairs as pairs_module
from cocoa_embed.evaluation.metrics import METRICS
from cocoa_embed.evaluation.pairs import directions, evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import Pair, read_pairs
from cocoa_embed.evaluation.pairs_tables import shown_metrics

NAMES = list(COLOURS)


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """An image folder: 20 images with two captions each, one caption of two images."""
    common = ["the red pair" if number in (4, 8) else f"a {number}th" for number in range(20)]
    return write_captioned(
        tmp_path / "captioned", [[f"{NAMES[number % 4]} number {number}", common[number]] for number in range(20)]
    )


def by_brute_force(model: ScoredModel, folder: Path) -> dict[str, dict[str, float]]:
    """Score an image folder query by query, without the package."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    texts, files = sorted({row["text"] for row in rows}), sorted({row["file_name"] for row in rows})
    related = {(row["text"], row["file_name"]) for row in rows}

    def embed(key: str, encode: Callable[..., np.ndarray]) -> np.ndarray:
        item = {"image": Image.open(folder / key).convert("RGB")} if key in files else {"text": key}
        return encode([item], batch_size=1, show_progress_bar=False)[0].astype(float)

    measured = {}
    for name, queries, documents in (("text_to_image", texts, files), ("image_to_text", files, texts)):
        vectors = {document: embed(document, model.encode_document) for document in documents}
        values = []
        for query in queries:
            vector = embed(query, model.encode_query)
            order = sorted(documents, key=lambda document: -float(vectors[document] @ vector))
            places = [place for place, each in enumerate(order, 1) if {(query, each), (each, query)} & related]
            ratio = sum(place <= 5 for place in places) / len(places)
            values.append((ratio, float(places[0] == 1), 1 / places[0]))
        measured[name] = dict(zip(("recall@5", "hit@1", "mrr"), np.mean(values, axis=0).tolist(), strict=True))
    return measured


@pytest.mark.parametrize(("noise", "at_once"), [(30.0, 512), (200.0, 7)])
def test_scores_of_both_directions_equal_those_of_brute_force(
    captioned: Path, noise: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "QUERIES_AT_ONCE", at_once)
    document = evaluate_pairs([Encoder(ScoredModel(noise=noise), "one")], read_pairs(captioned), resamples=50)
    expected = by_brute_force(ScoredModel(noise=noise), captioned)
    assert document["subsets"].keys() == expected.keys() == {"text_to_image", "image_to_text"}
    for direction, metrics in expected.items():
        assert {name: document["subsets"][direction][name] for name in metrics} == pytest.approx(metrics), direction
        assert 0 < metrics["mrr"] < 1
    both = [[metrics[name] for name in METRICS] for metrics in document["subsets"].values()]
    assert list(document["averages"].values()) == pytest.approx(np.mean(both, axis=0).tolist())
    assert document["counts"]["text_to_image"] == {"queries": 39, "documents": 20, "groups": 19}
    assert document["counts"]["image_to_text"] == {"queries": 20, "documents": 39, "groups": 19}
    assert document["chance"]["image_to_text"]["recall@10"] == pytest.approx(10 / 39)
    assert document["chance"]["text_to_image"]["hit@1"] == pytest.approx((38 * 1 / 20 + 2 / 20) / 39)


class KnownRanks(ScoredModel):
    """Some captions of image ``i`` equal it; the others point at the next image, and less exactly."""

    def __init__(self, right: list[int]) -> None:
        super().__init__()
        self.right, self.dimension = right, len(right) + 1

    def _embed(self, item: dict[str, Any]) -> np.ndarray:
        axes = np.eye(self.dimension, dtype=np.float32)
        if "image" in item:
            return axes[item["image"].getpixel((0, 0))[0]]
        image, number = map(int, item["text"].split()[-2:])
        following = (image + 1) % len(self.right)
        return axes[image] if number < self.right[image] else 0.8 * axes[following] + 0.6 * axes[-1]


@pytest.mark.parametrize("right", [[3] * 8, [5, 4, 3, 2, 1, 0, 5, 5]])
def test_a_folder_with_captions_is_scored_by_the_standard_protocol(tmp_path: Path, right: list[int]) -> None:
    rows = []
    for image in range(len(right)):
        Image.new("RGB", (28, 28), (image, 0, 0)).save(tmp_path / f"{image}.png")
        captions = [f"caption {image} {number}" for number in range(5)]
        rows.append({"file_name": f"{image}.png", "text": captions[0], "captions": captions})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = evaluate_pairs([Encoder(KnownRanks(right), "known")], read_pairs(tmp_path), resamples=200)
    to_image, to_text = found["subsets"]["text_to_image"], found["subsets"]["image_to_text"]
    assert found["counts"]["text_to_image"] == {"queries": 40, "documents": 8, "groups": 8}
    assert to_image["hit@1"] == to_image["recall@1"] == pytest.approx(np.mean(right) / 5)
    assert to_text["hit@1"] == np.mean(np.array(right) > 0)
    assert to_text["recall@5"] == pytest.approx(np.mean(right) / 5), "the ratio of five captions"
    low, high = found["intervals"]["text_to_image"]["hit@1"]
    # Resampled captions would differ in any case; resampled images are all alike in the first.
    assert (high - low < 1e-9) == (len(set(right)) == 1)
    alone = evaluate_pairs([Encoder(KnownRanks(right), "known")], read_pairs(tmp_path, captions="text"), resamples=10)
    assert alone["counts"]["text_to_image"]["queries"] == 8
    assert (shown_metrics(found)[0], shown_metrics(alone)[0]) == ("hit@1", "recall@1")


def test_captions_of_an_image_and_images_of_a_caption_are_all_relevant() -> None:
    a, b, c = (Item(images=(Path(name),)) for name in "abc")
    x, y, z = (Item(name) for name in "xyz")
    there, back = directions([Pair(x, a), Pair(y, a), Pair(y, b), Pair(z, c), Pair(z, c)])
    assert [each.tolist() for each in there.relevant] == [[0], [0, 1], [2]]
    assert [each.tolist() for each in back.relevant] == [[0, 1], [1], [2]]
    for direction in (there, back):
        assert direction.groups[0] == direction.groups[1] != direction.groups[2]


TEXT, IMAGE, BOTH = Item("a"), Item(None, (Path("b"),)), Item("a", (Path("b"),))


def test_directions_are_named_by_the_parts_of_their_items() -> None:
    for pairs, names in (
        ([(TEXT, BOTH), (Item("c"), Item("c", (Path("d"),)))], ["text_to_image_and_text", "image_and_text_to_text"]),
        ([(TEXT, Item("b")), (Item("c"), Item("d"))], ["first_to_second", "second_to_first"]),
        ([(TEXT, IMAGE), (BOTH, Item(None, (Path("d"),)))], ["mixed_to_image", "image_to_mixed"]),
    ):
        assert [each.name for each in directions([Pair(*pair) for pair in pairs])] == names


def test_pairs_of_one_document_and_of_another_kind_than_the_models_are_refused(captioned: Path) -> None:
    with pytest.raises(CocoaError, match="2 pairs have only one distinct query or document"):
        directions([Pair(TEXT, IMAGE), Pair(Item("c"), IMAGE)])
    with pytest.raises(CocoaError, match="words does not embed image; these pairs need a model that does"):
        evaluate_pairs([Encoder(ScoredModel(modalities=("text",)), "words")], read_pairs(captioned))


def test_intervals_hold_the_scores_and_depend_on_the_seed(captioned: Path) -> None:
    pairs, model = read_pairs(captioned), Encoder(ScoredModel(noise=100.0), "one")
    first, again, other = (evaluate_pairs([model], pairs, seed=seed) for seed in (3, 3, 4))
    for direction, metrics in first["subsets"].items():
        intervals = first["intervals"][direction]
        assert all(0 <= intervals[name][0] <= value <= intervals[name][1] <= 1 for name, value in metrics.items())
    assert first == again == json.loads(json.dumps(first))
    assert first["intervals"] != other["intervals"]


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


def test_the_first_model_is_freed_before_the_second_is_loaded(captioned: Path) -> None:
    loaded: list[weakref.ref[ScoredModel]] = []

    def load(seed: int) -> Encoder:
        assert not [reference for reference in loaded if reference() is not None]
        model = ScoredModel(seed)
        loaded.append(weakref.ref(model))
        return Encoder(model, str(seed))

    evaluate_pairs((load(seed) for seed in range(2)), read_pairs(captioned), resamples=10)
    assert len(loaded) == 2
