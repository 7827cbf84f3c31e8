"""Scores on MMEB-V1 equal those of brute force; finished subsets are cached, incomplete rows skipped."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_model import colour_image
from mmeb_layout import mmeb_row, subset_rows, write_benchmark, write_mosaics, write_subset
from PIL import Image
from scored_model import ScoredModel

from cocoa_embed.data.mmeb import SUBSETS
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.mmeb import evaluate_mmeb
from cocoa_embed.evaluation.mmeb_reader import MmebFolder
from cocoa_embed.evaluation.result_cache import ResultCache

ROWS = 12

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def benchmark_folder(tmp_path: Path) -> MmebFolder:
    return MmebFolder(*write_benchmark(tmp_path, ROWS))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(model: ScoredModel, folder: MmebFolder, *names: str, **options: Any) -> dict[str, Any]:
        cache = ResultCache(tmp_path / "finished")
        return evaluate_mmeb(Encoder(model, "scored"), folder, folder.read_subsets(names), cache, **options)

    return run


def by_brute_force(model: ScoredModel, data: Path, images: Path, name: str) -> dict[str, float]:
    """Score a subset item by item, without the package."""

    def embed(text: str, path: str, encode: Callable[..., np.ndarray]) -> list[float]:
        item: dict[str, Any] = {}
        if path:
            item["image"] = Image.open(images / path).convert("RGB")
        text = text.replace("<|image_1|>", "").strip()
        if text:
            item["text"] = text
        return encode([item], batch_size=1, show_progress_bar=False)[0].tolist()

    def cosine(one: list[float], other: list[float]) -> float:
        length = math.sqrt(math.fsum(x * x for x in one)) * math.sqrt(math.fsum(x * x for x in other))
        return math.fsum(x * y for x, y in zip(one, other, strict=True)) / length

    places = []
    for row in pd.concat([pd.read_parquet(file) for file in sorted((data / name).iterdir())]).itertuples():
        query = embed(row.qry_text, row.qry_img_path, model.encode_query)
        scores = [
            (cosine(query, embed(text, path, model.encode_document)), number)
            for number, (text, path) in enumerate(zip(row.tgt_text, row.tgt_img_path, strict=True))
        ]
        places.append([number for _, number in sorted(scores, reverse=True)].index(0))
    return {
        "precision@1": sum(place == 0 for place in places) / len(places),
        "hit@5": sum(place < 5 for place in places) / len(places),
        "mrr": sum(1 / (place + 1) for place in places) / len(places),
        "ndcg@10": sum(math.log(2) / math.log(place + 2) for place in places if place < 10) / len(places),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_of_all_meta_tasks_are_those_of_brute_force(run: Run, benchmark_folder: MmebFolder, seed: int) -> None:
    document = run(ScoredModel(seed), benchmark_folder)
    assert {SUBSETS[name].meta_task for name in document["subsets"]} == {
        "classification", "VQA", "retrieval", "grounding"
    }  # fmt: skip
    for name, result in document["subsets"].items():
        expected = by_brute_force(ScoredModel(seed), benchmark_folder.data, benchmark_folder.images, name)
        assert {metric: result[metric] for metric in expected} == pytest.approx(expected), name
        assert result["hit@1"] == result["precision@1"]
        assert (result["rows"], result["partial"], result["tied_rows"]) == (ROWS, False, 0)
        candidates = pd.read_parquet(benchmark_folder.data / name).tgt_text.map(len)
        assert result["chance"] == pytest.approx((1 / candidates).mean())
    precisions = [result["precision@1"] for result in document["subsets"].values()]
    assert len({round(each, 6) for each in precisions}) > 1, "the premise: the scores differ"
    assert 0 < document["averages"]["overall"] < 1


def test_averages_are_plain_means_over_what_was_run_and_say_so(run: Run, benchmark_folder: MmebFolder) -> None:
    document = run(ScoredModel(), benchmark_folder, "ImageNet-1K", "OK-VQA", "RefCOCO-Matching")
    precision = {name: result["precision@1"] for name, result in document["subsets"].items()}
    averages = document["averages"]
    assert averages["classification"] == precision["ImageNet-1K"]
    assert averages["retrieval"] is None
    assert averages["IND"] == pytest.approx((precision["ImageNet-1K"] + precision["OK-VQA"]) / 2)
    assert averages["OOD"] == precision["RefCOCO-Matching"]
    assert averages["overall"] == pytest.approx(sum(precision.values()) / 3)
    assert document["coverage"]["overall"] == {"run": 3, "of": 36, "complete": False}
    assert document["not_run"]["MSCOCO_t2i"] == "not selected"
    assert document["not_run"]["GQA"] == "not in the data"
    assert len(document["subsets"]) + len(document["not_run"]) == 36


def test_each_distinct_query_and_target_is_embedded_once(run: Run, benchmark_folder: MmebFolder) -> None:
    model = ScoredModel()
    result = run(model, benchmark_folder, "ImageNet-1K")["subsets"]["ImageNet-1K"]
    assert (result["queries"], result["targets"]) == (ROWS, 4)
    assert (len(model.queries), len(model.documents)) == (ROWS, 4)
    assert {item["text"] for item in model.queries} == {"find: Represent the given image for classification"}
    again = ScoredModel()
    assert run(again, benchmark_folder, "ImageNet-1K")["subsets"]["ImageNet-1K"] == result
    assert again.calls == 0, "a finished subset is cached"


def test_a_subset_is_scored_again_for_another_model_or_other_data(
    run: Run, benchmark_folder: MmebFolder, tmp_path: Path
) -> None:
    def calls(seed: int = 0, limit: int | None = None) -> int:
        model = ScoredModel(seed)
        run(model, MmebFolder(benchmark_folder.data, benchmark_folder.images, limit), "MSCOCO_t2i")
        return model.calls

    assert calls() > 0
    assert calls() == 0
    assert calls(seed=1) > 0
    assert calls(limit=5) > 0
    assert calls(limit=ROWS + 5) == 0, "a limit above the rows is none"
    colour_image("red", (32, 32)).save(benchmark_folder.images / "MSCOCO_t2i/0003.png")
    assert calls() > 0
    for file in (tmp_path / "finished").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert calls() > 0, "a result that is cut short is not used"
    rows = subset_rows(tmp_path / "elsewhere", "MSCOCO_t2i", ROWS)
    rows[0]["qry_text"] += "!"
    write_subset(benchmark_folder.data, "MSCOCO_t2i", rows)
    assert calls() > 0
    assert len(list((tmp_path / "finished").glob("MSCOCO_t2i-*.json"))) == 5, "older results stay"


def test_equal_candidates_count_against_the_right_one_and_are_reported(run: Run, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("query", "right", "copy"):
        colour_image("red").save(tmp_path / "images" / f"{name}.png")
    colour_image("blue").save(tmp_path / "images" / "other.png")
    rows = [mmeb_row("", "query.png", ["", ""], ["right.png", wrong]) for wrong in ("copy.png", "other.png")]
    write_subset(tmp_path / "data", "NIGHTS", rows)
    result = run(ScoredModel(), MmebFolder(tmp_path / "data", tmp_path / "images"))["subsets"]["NIGHTS"]
    assert (result["precision@1"], result["mrr"], result["tied_rows"]) == (0.5, 0.75, 1)


def test_rows_with_unusable_images_are_an_error_or_skipped_and_counted(run: Run, benchmark_folder: MmebFolder) -> None:
    images = benchmark_folder.images
    (images / "ImageNet-1K/0005.png").write_bytes(b"\x89PNG nothing more")
    with pytest.raises(CocoaError, match=r"ImageNet-1K: .*0005\.png: .*--missing-images skip"):
        run(ScoredModel(), benchmark_folder, "ImageNet-1K")
    (images / "ImageNet-1K/0002.png").unlink()
    with pytest.raises(CocoaError, match=r"1 of the 12 images of ImageNet-1K .*'ImageNet-1K/0002.png'.*skip"):
        run(ScoredModel(), benchmark_folder, "ImageNet-1K")
    model = ScoredModel()
    skipping = replace(benchmark_folder, skip_missing_images=True)
    result = run(model, skipping, "ImageNet-1K")["subsets"]["ImageNet-1K"]
    assert (result["rows"], result["rows_without_image"], result["partial"]) == (ROWS - 2, 2, True)
    assert len(model.queries) == ROWS - 2


def test_a_row_is_skipped_if_an_image_of_a_candidate_is_missing(run: Run, benchmark_folder: MmebFolder) -> None:
    data, images = benchmark_folder.data, benchmark_folder.images
    frame = pd.read_parquet(data / "MSCOCO_t2i")
    lacking = [any(path.endswith("0004.png") for path in paths) for paths in frame.tgt_img_path]
    assert 0 < sum(lacking) < ROWS
    (images / "MSCOCO_t2i/0004.png").unlink()
    model = ScoredModel()
    result = run(model, MmebFolder(data, images, skip_missing_images=True), "MSCOCO_t2i")["subsets"]["MSCOCO_t2i"]
    assert result["rows_without_image"] == sum(lacking)
    frame[[not each for each in lacking]].to_parquet(data / "MSCOCO_t2i/test-00000-of-00001.parquet")
    expected = by_brute_force(ScoredModel(), data, images, "MSCOCO_t2i")
    assert {metric: result[metric] for metric in expected} == pytest.approx(expected)


def test_subsets_that_the_model_does_not_support_are_not_run(
    run: Run, benchmark_folder: MmebFolder, tmp_path: Path
) -> None:
    with pytest.raises(CocoaError, match="nothing was run: scored does not embed image and text together; use a model"):
        run(ScoredModel(modalities=("text",)), benchmark_folder)

    class Apart(ScoredModel):
        def supports(self, modality: str | tuple[str, ...]) -> bool:
            return isinstance(modality, str)

    paths = write_mosaics(benchmark_folder.images, "NIGHTS", 3, 9)
    rows = [mmeb_row("", path, [""] * 3, [path, *(each for each in paths if each != path)]) for path in paths]
    write_subset(benchmark_folder.data, "NIGHTS", rows)
    document = run(Apart(), benchmark_folder)
    assert list(document["subsets"]) == ["NIGHTS"]
    assert document["subsets"]["NIGHTS"]["precision@1"] == 1.0
    assert document["not_run"]["OK-VQA"] == "scored does not embed image and text together"


def test_results_that_cannot_be_written_are_one_sentence(benchmark_folder: MmebFolder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CocoaError, match=r"finished cannot be made .*give another folder with --out"):
        ResultCache(tmp_path / "file" / "finished")
    parts = ResultCache(tmp_path / "parts")
    os.rmdir(tmp_path / "parts")
    with pytest.raises(CocoaError, match=r"OK-VQA-\w+\.json cannot be written"):
        parts.write("OK-VQA", {"model": "m"}, {})
