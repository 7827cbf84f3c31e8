"""Results of ``cocoa-embed eval`` in the report of a run: whose they are, and what becomes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cocoa_embed.data.mmeb import SUBSETS
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.mmeb import TOLD, summary
from cocoa_embed.model.export import export_model
from cocoa_embed.report.content import RunReport
from cocoa_embed.report.page import render_report
from cocoa_embed.train.run_report.content import Asked, run_report
from cocoa_embed.train.run_report.evaluations import is_of_run, read_evaluation
from cocoa_embed.train.run_report.finished_run import read_run
from cocoa_embed.train.run_report.scores import UNTOLD


def pairs_document(model: str) -> dict[str, Any]:
    metrics = dict.fromkeys(("recall@1", "recall@5", "recall@10", "hit@5", "hit@10", "mrr", "ndcg@10"), 0.5)
    metrics["hit@1"] = 0.75
    return {
        "benchmark": "pairs",
        "model": model,
        "subsets": {"text_to_image": metrics},
        "intervals": {"text_to_image": {metric: [0.4, 0.8] for metric in metrics}},
        "counts": {"text_to_image": {"queries": 3, "documents": 4, "groups": 3}},
        "level": 0.95,
        "resamples": 10,
        "seed": 0,
    }


def test_results_in_the_runs_folder_are_taken_without_asking_and_others_when_asked(copy: Path, tmp_path: Path) -> None:
    (copy / "eval").mkdir()
    (copy / "eval" / "pairs.json").write_text(json.dumps(pairs_document("inside")))
    (copy / "eval" / "other.json").write_text("{}")
    (tmp_path / "given.json").write_text(json.dumps(pairs_document("given")))
    asked = [tmp_path / "given.json", copy / "eval" / "pairs.json"]
    shown = run_report(read_run(copy), Asked(evaluations=asked, scores=False))
    titles = [evaluation.title for evaluation in shown.evaluations]
    assert titles == ["Another model: given", "Another model: inside"], "each once"
    assert [alert for alert in shown.alerts if "other.json is no result of cocoa-embed eval" in alert]


def test_only_a_model_of_the_run_makes_a_headline(finished: Path, tmp_path: Path) -> None:
    run = read_run(finished)
    exported, strange = tmp_path / "exported", tmp_path / "strange"
    export_model(finished / "contrastive", exported)
    export_model(finished / "contrastive", strange)
    training = json.loads((strange / "cocoa_training.json").read_text())
    training["stages"][-1]["seconds"] += 1
    (strange / "cocoa_training.json").write_text(json.dumps(training))
    for model, is_own in (
        (finished / "contrastive", True),
        (exported, True),
        (strange, False),
        ("owner/name", False),
        ("no\0path", False),
        (tmp_path / "missing", False),
    ):
        (tmp_path / "pairs.json").write_text(json.dumps(pairs_document(str(model))))
        evaluation, headlines = read_evaluation(tmp_path / "pairs.json", run)
        assert evaluation.title == f"{'Pairs' if is_own else 'Another model'}: {model}"
        assert [headline.value for headline in headlines] == ["75.0 %"] * is_own
        assert all("40.0 to 80.0 %" in headline.detail for headline in headlines)
    shown = run_report(run, Asked(evaluations=[tmp_path / "pairs.json"], scores=False))
    assert shown.headlines == []


def test_an_export_is_known_also_where_weights_of_earlier_stages_are_gone(copy: Path, tmp_path: Path) -> None:
    export_model(copy / "contrastive", tmp_path / "exported")
    (copy / "bridge" / "model.safetensors").unlink()
    shutil.rmtree(copy / "warmup")
    assert is_of_run(str(tmp_path / "exported"), read_run(copy))


def test_pairs_that_the_run_was_trained_on_make_no_headline(finished: Path, scene_folder: Path, tmp_path: Path) -> None:
    run, file = read_run(finished), tmp_path / "pairs.json"
    others = tmp_path / "others.jsonl"
    others.write_text("\n".join(json.dumps({"left": f"query {row}", "right": f"answer {row}"}) for row in range(3)))
    columns = {"query_text": "left", "query_image": None, "positive_text": "right", "positive_image": None}

    def read(path: Path, columns: dict[str, str | None]) -> tuple[str, list[str]]:
        data = {"path": str(path), "images": None, "columns": columns}
        file.write_text(json.dumps(pairs_document(str(finished / "contrastive")) | {"data": data}))
        evaluation, headlines = read_evaluation(file, run)
        return evaluation.note, [headline.detail for headline in headlines]

    note, headlines = read(scene_folder, dict.fromkeys(columns))
    assert "24 of 24 are among the rows that the run" in note
    assert headlines == []
    note, headlines = read(others, columns)
    assert "None of them is among the rows" in note
    assert [UNTOLD in headline for headline in headlines] == [False]
    for path in (tmp_path / "gone.jsonl", tmp_path / ("too long a name " * 20)):
        note, headlines = read(path, columns)
        assert "They cannot be read any more" in note
        assert [UNTOLD in headline for headline in headlines] == [True]
    file.write_text(json.dumps(pairs_document(str(finished / "contrastive"))))
    evaluation, (headline,) = read_evaluation(file, run)
    assert "Which pairs these are, the file does not tell" in evaluation.note
    assert UNTOLD in headline.detail


def test_mmeb_is_shown_with_what_was_not_run_marked_as_such(finished: Path, tmp_path: Path) -> None:
    model = str(finished / "contrastive")
    metrics = dict.fromkeys(("precision@1", "hit@5", "hit@10", "mrr", "ndcg@10"), 0.25)
    result = {"metrics": metrics, **dict.fromkeys(TOLD, 0), "rows": 8, "rows_in_data": 8, "partial": False}
    documents = {
        "none": summary(model, "f", {}, dict.fromkeys(SUBSETS, "not asked for")),
        "one": summary(model, "f", {"GQA": result}, dict.fromkeys(set(SUBSETS) - {"GQA"}, "not asked for")),
        "other": summary("ours", "f", {"GQA": result}, dict.fromkeys(set(SUBSETS) - {"GQA"}, "not asked for")),
    }
    found = {}
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
        found[name] = read_evaluation(tmp_path / f"{name}.json", read_run(finished))
    evaluation, headlines = found["one"]
    assert evaluation.title == f"MMEB-V1: {model}"
    assert [table.title for table in evaluation.tables] == ["Averages", "Subsets"]
    assert [(headline.value, headline.detail) for headline in headlines] == [
        ("25.0 %", f"{model}. Not complete: 1 of 36 subsets.")
    ]
    assert found["none"][1] == found["other"][1] == []
    assert found["other"][0].title == "Another model: ours"
    page = render_report(RunReport("mmeb", "", evaluations=[evaluation]))
    assert page.count("not run: not asked for") == 35


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmark": "pairs"}', '{"benchmark": ["x"]}', '{"benchmark": 3}'])
def test_a_file_that_is_no_result_is_refused(finished: Path, tmp_path: Path, text: str) -> None:
    file, run = tmp_path / "pairs.json", read_run(finished)
    file.write_text(text)
    with pytest.raises(CocoaError, match=r"pairs\.json is no result of cocoa-embed eval"):
        read_evaluation(file, run)
    with pytest.raises(CocoaError, match="cannot be read"):
        read_evaluation(tmp_path / "missing.json", run)
