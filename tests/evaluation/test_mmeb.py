"""Scores on MMEB-V1 equal those of brute force; finished subsets are cached."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_model import colour_image
from PIL import Image
from scored_model import ScoredModel, mmeb_row, subset_rows, write_benchmark, write_mosaics, write_subset

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


def by_brute_force(seed: int, folder: MmebFolder, name: str) -> dict[str, float]:
    """Score a subset item by item, without the package."""
    model = ScoredModel(seed)

    def embed(text: str, path: str, encode: Callable[..., np.ndarray]) -> np.ndarray:
        item: dict[str, Any] = {"image": Image.open(folder.images / path).convert("RGB")} if path else {}
        if text := text.replace("<|image_1|>", "").strip():
            item["text"] = text
        return encode([item], batch_size=1, show_progress_bar=False)[0].astype(float)

    places = []
    for row in pd.read_parquet(folder.data / name).itertuples():
        query = embed(row.qry_text, row.qry_img_path, model.encode_query)
        candidates = zip(row.tgt_text, row.tgt_img_path, strict=True)
        right, *wrong = (query @ embed(*candidate, model.encode_document) for candidate in candidates)
        places.append(1 + sum(score >= right for score in wrong))
    return {
        "precision@1": places.count(1) / len(places),
        "hit@5": sum(place <= 5 for place in places) / len(places),
        "mrr": sum(1 / place for place in places) / len(places),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_of_all_meta_tasks_are_those_of_brute_force(run: Run, benchmark_folder: MmebFolder, seed: int) -> None:
    document = run(ScoredModel(seed), benchmark_folder)
    assert len({SUBSETS[name].meta_task for name in document["subsets"]}) == 4
    for name, result in document["subsets"].items():
        expected = by_brute_force(seed, benchmark_folder, name)
        assert {metric: result[metric] for metric in expected} == pytest.approx(expected), name
        assert result["hit@1"] == result["precision@1"]
        assert (result["rows"], result["partial"], result["tied_rows"]) == (ROWS, False, 0)
        candidates = pd.read_parquet(benchmark_folder.data / name).tgt_text.map(len)
        assert result["chance"] == pytest.approx((1 / candidates).mean())
    assert len({result["precision@1"] for result in document["subsets"].values()}) > 1, "the premise: the scores differ"
    model, result = ScoredModel(seed), document["subsets"]["ImageNet-1K"]
    run(model, replace(benchmark_folder, limit=ROWS - 1), "ImageNet-1K")
    assert (len(model.queries), len(model.documents)) == (ROWS - 1, 4), "each distinct one is embedded once"
    assert {item["text"] for item in model.queries} == {"find: Represent the given image for classification"}
    assert (result["queries"], result["targets"]) == (ROWS, 4)


def test_a_subset_is_scored_again_for_another_model_or_other_data(
    run: Run, benchmark_folder: MmebFolder, tmp_path: Path
) -> None:
    def is_scored(seed: int = 0, limit: int | None = None) -> bool:
        model = ScoredModel(seed)
        run(model, replace(benchmark_folder, limit=limit), "MSCOCO_t2i")
        return model.calls > 0

    assert [is_scored(), is_scored(), is_scored(seed=1), is_scored(limit=5)] == [True, False, True, True]
    assert not is_scored(limit=ROWS + 5), "a limit above the rows is none"
    colour_image("red", (32, 32)).save(benchmark_folder.images / "MSCOCO_t2i/0003.png")
    assert is_scored()
    for file in (tmp_path / "finished").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert is_scored(), "a result that is cut short is not used"
    rows = subset_rows(tmp_path / "elsewhere", "MSCOCO_t2i", ROWS)
    rows[0]["qry_text"] += "!"
    write_subset(benchmark_folder.data, "MSCOCO_t2i", rows)
    assert is_scored()
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


def test_a_broken_image_is_an_error(run: Run, benchmark_folder: MmebFolder) -> None:
    (benchmark_folder.images / "ImageNet-1K/0005.png").write_bytes(b"\x89PNG nothing more")
    with pytest.raises(CocoaError, match=r"ImageNet-1K: .*0005\.png: .*download the image again"):
        run(ScoredModel(), benchmark_folder, "ImageNet-1K")


def test_subsets_that_the_model_does_not_support_are_not_run(run: Run, benchmark_folder: MmebFolder) -> None:
    with pytest.raises(CocoaError, match="nothing was run: scored does not embed image and text together; use a model"):
        run(ScoredModel(modalities=("text",)), benchmark_folder)

    class Apart(ScoredModel):
        def supports(self, modality: str | tuple[str, ...]) -> bool:
            return isinstance(modality, str)

    paths = write_mosaics(benchmark_folder.images, "NIGHTS", 3, 9)
    rows = [mmeb_row("", path, [""] * 3, [path, *(each for each in paths if each != path)]) for path in paths]
    write_subset(benchmark_folder.data, "NIGHTS", rows)
    document = run(Apart(), benchmark_folder)
    assert {name: result["precision@1"] for name, result in document["subsets"].items()} == {"NIGHTS": 1.0}
    assert document["not_run"]["OK-VQA"] == "scored does not embed image and text together"


def test_a_result_that_cannot_be_written_is_reported_in_one_sentence(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "finished")
    os.rmdir(tmp_path / "finished")
    with pytest.raises(CocoaError, match=r"OK-VQA-\w+\.json cannot be written"):
        cache.write("OK-VQA", {"model": "m"}, {})
