"""The command ``cocoa-embed eval``: standard output, files, messages and exit codes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command, Result
from fake_model import COLOURS
from scored_model import ScoredModel, subset_rows, write_benchmark, write_captioned, write_subset
from tiny_backbones import tiny_clip_model

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.model import loading

Run = Callable[..., Result]
ROWS = 8


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, ScoredModel]:
    """The models that can be loaded, by name."""
    found = {"ours": ScoredModel(0, noise=10.0), "theirs": ScoredModel(1, noise=400.0)}

    def load(name: str, device: str | None, max_pixels: int | None) -> Encoder:
        if name not in found:
            raise CocoaError(f"{name} cannot be loaded")
        return Encoder(found[name], name)

    monkeypatch.setattr("cocoa_embed.encode.load.load_encoder", load)
    monkeypatch.setattr(loading, "check_model", lambda name: None)
    return found


@pytest.fixture
def mmeb(tmp_path: Path, command: Command, models: dict[str, ScoredModel]) -> Run:
    data, images = write_benchmark(tmp_path, ROWS)
    return partial(command, "eval", "mmeb", data, "--images", images, "--model", "ours")


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return write_captioned(tmp_path / "scenes", [[f"{name} {number}"] for number in range(3) for name in COLOURS])


@pytest.fixture
def pairs(command: Command, scenes: Path) -> Run:
    return partial(command, "eval", "pairs", scenes, "--model")


def test_mmeb_prints_json_and_tables_and_writes_three_files(mmeb: Run) -> None:
    done = mmeb("--json")
    document = done.document()
    assert document["subsets"].keys() == {"ImageNet-1K", "OK-VQA", "MSCOCO_t2i", "RefCOCO-Matching"}
    assert {"classification", "VQA", "retrieval", "grounding", "IND", "OOD", "overall"} == document["averages"].keys()
    assert all(part in done.err for part in ("ImageNet-1K: precision@1", "overall", "4/36"))
    (folder,) = Path("cocoa-eval").iterdir()
    assert folder.name == f"ours-{document['fingerprint'][:8]}"
    assert json.loads((folder / "mmeb.json").read_text()) == document
    assert "| ours |" in (folder / "mmeb.md").read_text()
    assert "CoCoA (Qwen2-VL-2B)" in (folder / "mmeb.html").read_text()
    (finished,) = (folder / "finished").glob("OK-VQA-*.json")
    ranks = json.loads(finished.read_text())["by_row"]["rank"]
    assert document["subsets"]["OK-VQA"]["precision@1"] == sum(rank == 1 for rank in ranks) / ROWS


def test_an_interrupted_run_keeps_finished_subsets(mmeb: Run, models: dict[str, ScoredModel]) -> None:
    class Interrupted(ScoredModel):
        def encode_document(self, *args: Any, **options: Any) -> np.ndarray:
            if len(self.queries) > ROWS:
                raise KeyboardInterrupt
            return super().encode_document(*args, **options)

    models["ours"] = Interrupted()
    assert mmeb("--out", "results").error() == (
        "1 interrupted; 1 of 4 subsets are finished in results; the same command continues from there"
    )
    written = json.loads(Path("results/mmeb.json").read_text())
    assert (list(written["subsets"]), written["not_run"]["OK-VQA"]) == (["ImageNet-1K"], "not finished")
    models["ours"] = ScoredModel()
    assert "ImageNet-1K: precision@1" in mmeb("--out", "results").err
    assert not [item for item in models["ours"].queries if "classification" in item["text"]]


def test_wrong_input_of_mmeb_is_reported_in_one_sentence_before_the_model_is_loaded(
    mmeb: Run, models: dict[str, ScoredModel], tmp_path: Path
) -> None:
    ours = models.pop("ours")
    rows = subset_rows(tmp_path / "eval_images", "MSCOCO_t2i", ROWS)
    rows[0]["tgt_img_path"][2] = rows[0]["tgt_img_path"][1]
    write_subset(tmp_path / "MMEB-eval", "MSCOCO_t2i", rows)
    assert "row 1: two candidates are the same target" in mmeb("--subset", "MSCOCO_t2i").error()
    assert not Path("cocoa-eval").exists()
    models["ours"] = ours
    chosen = ("--subset", "MSCOCO_t2i", "--subset", "ImageNet-1K", "--limit", 3, "--repeated-targets", "merge")
    subsets = mmeb(*chosen, "--json").document()["subsets"]
    assert [(name, each["rows"], each["rows_merged"], each["partial"]) for name, each in subsets.items()] == [
        ("ImageNet-1K", 3, 0, True), ("MSCOCO_t2i", 3, 1, True)
    ]  # fmt: skip


@pytest.mark.usefixtures("models")
def test_pairs_prints_json_and_writes_files_with_out(pairs: Run) -> None:
    done = pairs("ours", "--json")
    document = done.document()
    assert document["subsets"].keys() == {"text_to_image", "image_to_text"}
    assert {"recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"} <= document["subsets"]["text_to_image"].keys()
    assert done.err.count("recall@1 ") == done.err.count("ours") == done.err.count("chance") == 2
    assert sorted(path.name for path in Path().iterdir()) == ["scenes"]
    code, out, err = pairs("ours", "--model", "theirs", "--out", "results", "--seed", 5)
    assert (code, out, err.count(": difference")) == (0, "", 2)
    written = json.loads(Path("results/pairs.json").read_text())
    assert written["subsets"] == document["subsets"]
    assert (written["seed"], written["other"]["model"]) == (5, "theirs")
    assert all("ours minus theirs" in Path(f"results/pairs.{suffix}").read_text() for suffix in ("md", "html"))


@pytest.mark.usefixtures("models")
def test_pairs_of_a_table_with_named_columns(pairs: Run, command: Command, scenes: Path, tmp_path: Path) -> None:
    rows = map(json.loads, (scenes / "metadata.jsonl").read_text().splitlines())
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(json.dumps({"says": row["text"], "shows": row["file_name"]}) for row in rows))
    named = ("--query-text", "says", "--positive-image", "shows", "--images", scenes)
    document = command("eval", "pairs", table, "--model", "ours", "--json", *named).document()
    columns = {"query_text": "says", "query_image": None, "positive_text": None, "positive_image": "shows"}
    assert document["data"] == {"path": str(table), "images": str(scenes), "columns": columns}
    assert document["subsets"] == pairs("ours", "--json").document()["subsets"]


def test_a_model_of_another_architecture_is_scored_too(pairs: Run, scenes: Path) -> None:
    tiny_clip_model(scenes.parent / "weights").save(str(scenes.parent / "clip"))
    scores = pairs("clip", "--json").document()["subsets"]["text_to_image"]
    assert 0 < scores["mrr"] < 1


@pytest.mark.usefixtures("models")
def test_the_first_models_scores_are_shown_and_kept_if_the_second_model_fails(pairs: Run) -> None:
    alone = pairs("ours", "--json").document()
    done = pairs("ours", "--model", "broken", "--out", "results", "--json")
    assert "broken cannot be loaded" in done.error()
    assert done.err.count("chance") == 2
    assert json.loads(Path("results/pairs.json").read_text()) == alone


@pytest.mark.usefixtures("models")
def test_a_third_model_is_refused(pairs: Run) -> None:
    assert "2 --model was given 3 times" in pairs("ours", "--model", "ours", "--model", "ours").error()
