import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from browser import HtmlElements
from sentence_transformers import SentenceTransformer
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.demo.gallery import answer_queries
from cocoa_embed.demo.story import Demo
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import UsageError
from cocoa_embed.evaluation.pairs import evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.model.training_record import read_run
from cocoa_embed.train.data.caption_rows import read_image_folder

STAGE = {"steps": 2, "batch_size": 4, "warmup_steps": 0, "logging_steps": 1}
RECIPE = {
    "name": "two-steps",
    "max_length": TINY_MAX_LENGTH,
    "warmup": STAGE,
    "bridge": {**STAGE, "data": {"paraphrases": 1}},
    "contrastive": {**STAGE, "data": {"limit": 8}},
}
"""Two steps a stage, from a random backbone."""


class Finished(NamedTuple):
    demo: Demo
    results: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The whole demo, at the size of a test."""
    folder = tmp_path_factory.mktemp("demo")
    recipe = folder / "two-steps.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "backbone": str(tiny_backbone_path)}))
    demo = Demo(folder / "model", folder / "work", recipe=str(recipe), training_images=24, held_out_images=12)
    return Finished(demo, demo.run())


def test_the_results_are_written_with_time_and_memory_of_each_part(finished: Finished) -> None:
    assert json.loads((finished.demo.work / "results.json").read_text()) == finished.results
    stages = {"warmup", "bridge", "contrastive", "contrastive_only"}
    for measured in (finished.results["seconds"], finished.results["peak_memory_bytes"]):
        assert stages | {"data", "evaluation", "index and search", "total"} == measured.keys()
        assert all(value > 0 for value in measured.values())
    assert sum(finished.results["seconds"][stage] for stage in stages) < finished.results["seconds"]["total"]


def test_the_metrics_and_the_exported_model_are_those_of_the_checkpoints(finished: Finished) -> None:
    runs, pairs = finished.demo.work / "runs", read_pairs(finished.demo.work / "data" / "held-out", captions="text")
    encoder, other = (load_encoder(runs / name / "contrastive") for name in ("three-stages", "contrastive-only"))
    ours, alone = (evaluate_pairs([each], pairs, resamples=10)["subsets"] for each in (encoder, other))
    assert ours != alone, "the premise: the two models differ"
    for direction in ("text_to_image", "image_to_text"):
        assert finished.results[direction].items() <= ours[direction].items()
        assert finished.results["contrastive_only"][direction].items() <= alone[direction].items()
        assert finished.results[direction].keys() == {"recall@1", "recall@5", "recall@10", "mrr"}
    text = [{"text": "a small red circle"}]
    assert np.array_equal(SentenceTransformer(str(finished.demo.out)).encode(text), encoder.model.encode(text))
    card = (finished.demo.out / "README.md").read_text()
    assert f"{ours['text_to_image']['mrr']:.3f}" in card
    assert "24 drawn scenes; the contrastive stage saw 8 pairs of them" in " ".join(card.split())
    whole, alone = (read_run(runs / name)["recipe"] for name in ("three-stages", "contrastive-only"))
    assert {key for key in whole if whole[key] != alone[key]} == {"name", "warmup", "bridge"}


def test_the_gallery_searches_the_held_out_images_in_each_way_and_marks_the_right_hits(finished: Finished) -> None:
    assert finished.results["indexed"] == 12
    held_out = read_image_folder(finished.demo.work / "data" / "held-out")
    with QdrantIndexer(str(finished.demo.out), path=finished.demo.work / "index", collection="held-out") as indexer:
        assert indexer.store.require_signature().model == str(finished.demo.out.absolute())
        answers = answer_queries(indexer, held_out)
    kinds = ["text → image", "image → image", "image + text → image", "LlamaIndex: text → image"]
    assert [answer.title for answer in answers] == [kind for kind in kinds for _ in range(3)]
    by_text, by_image, through_llama_index = answers[:3], answers[3:6], answers[9:]
    for answer in by_image:
        assert answer.hits[0].correct, "an image finds itself with any model"
        assert answer.hits[0].caption == answer.expected
    for answer in answers:
        assert [hit.correct for hit in answer.hits] == [hit.caption == answer.expected for hit in answer.hits]
    for ours, theirs in zip(by_text, through_llama_index, strict=True):
        assert [hit.caption for hit in ours.hits] == [hit.caption for hit in theirs.hits]


def test_the_report_shows_every_part_and_loads_nothing(finished: Finished) -> None:
    page = HtmlElements((finished.demo.work / "report.html").read_text())
    (body,) = page.find("body")
    for part in ("warmup", "bridge", "contrastive only", "image + text → image", "LlamaIndex", "<EOS>", "chance"):
        assert part in body.text, part
    assert all(address.startswith(("data:", "#")) for address in page.loaded())


@pytest.mark.slow
def test_a_second_run_with_the_same_seed_replaces_the_first_and_gives_the_same(finished: Finished) -> None:
    stale = finished.demo.work / "runs" / "stale.txt"
    stale.touch()
    again = finished.demo.run()
    assert not stale.exists()
    directions = ("text_to_image", "image_to_text", "contrastive_only")
    assert {key: again[key] for key in directions} == {key: finished.results[key] for key in directions}


@pytest.mark.parametrize(("out", "work"), [("a", "a/b"), ("a/../b/c", "b")])
def test_folders_inside_each_other_are_refused_before_anything_is_drawn(tmp_path: Path, out: str, work: str) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="one lies inside the other"):
        Demo(tmp_path / out, tmp_path / work).run()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
