"""The report of a training run, from outside: a run made small, its page, and every way to ask for it wrongly."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from browser import needs_chromium, requested, seen
from cocoa_embed import cli
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation.mmeb import TOLD, summary
from cocoa_embed.evaluation.mmeb_subsets import SUBSETS
from cocoa_embed.evaluation.pairs_tables import directions_table
from cocoa_embed.export import TRAINING_FILE
from cocoa_embed.report.content import RunReport
from cocoa_embed.report.page import render_report
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.finished_run import read_run
from cocoa_embed.train.run_report import Asked, read_evaluation, run_report, write_run_report
from cocoa_embed.train.samples import SAMPLES_FILE
from conftest import TINY_MAX_LENGTH

STAGE: dict[str, Any] = {
    "steps": 2,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
}
ALERT_OF_OWN_ROWS = "rows that the model has been trained on"


@pytest.fixture(scope="module")
def recipe(tiny_backbone_path: Path, scene_folder: Path) -> Recipe:
    return Recipe.parse(
        {
            "name": "small",
            "backbone": str(tiny_backbone_path),
            "max_length": TINY_MAX_LENGTH,
            "data": {"folder": str(scene_folder), "captions": "captions"},
            "prompts": {"query": "find: "},
            "warmup": STAGE,
            "bridge": {**STAGE, "probe_rows": 4, "probe_steps": 1, "data": {"paraphrases": 1}},
            "contrastive": {
                "steps": 2,
                "batch_size": 4,
                "warmup_steps": 0,
                "logging_steps": 1,
                "data": {"captions": "text", "limit": 9},
            },
        }
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    run(recipe, out)
    return out


@pytest.fixture(scope="module")
def report(finished: Path) -> RunReport:
    return run_report(read_run(finished), Asked())


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The run, for a test that changes it."""
    return Path(shutil.copytree(finished, tmp_path / "small"))


@pytest.fixture
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes long: no model is loaded."""
    monkeypatch.setattr("cocoa_embed.train.run_report._scores", lambda *_: None)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["report", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def test_the_page_has_every_part_of_the_run(report: RunReport, finished: Path) -> None:
    assert report.title == "small"
    assert report.alerts == []
    assert [curve.stage for curve in report.curves] == ["warm-up", "bridge", "contrastive"]
    assert "accuracy_right_image" in report.curves[1].series
    assert len(report.patches) == 8
    assert [shown.stage for shown in report.tokens] == ["warm-up"] * 8 + ["bridge"] * 4
    assert "kept out" in report.sample_notes["bridge"]
    assert "trained on these rows" in report.sample_notes["warm-up"]
    assert report.bridge_mask is not None
    assert [gallery.title for gallery in report.galleries] == [
        f"{way}: the {which} queries" for way in ("Image to text", "Text to image") for which in ("worst", "best")
    ]
    assert dict(report.facts)["backbone"] == json.loads((finished / "recipe.json").read_text())["backbone"]


def test_rows_of_the_runs_own_are_those_it_was_trained_on_and_are_called_so(report: RunReport) -> None:
    (scored,) = report.evaluations
    assert scored.title == "The first 9 rows that the contrastive stage was trained on"
    assert ALERT_OF_OWN_ROWS in scored.note
    assert "no longer" not in scored.note
    assert all("trained on" in headline.detail for headline in report.headlines)
    assert {len(table.rows) for table in scored.tables} == {5}


def test_pairs_are_scored_as_eval_pairs_scores_them(finished: Path, scene_folder: Path, tmp_path: Path) -> None:
    shown = run_report(read_run(finished), Asked(pairs=scene_folder))
    arguments = ["eval", "pairs", str(scene_folder), "--model", str(finished / "contrastive"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    document = json.loads((tmp_path / "pairs.json").read_text())
    (scored,) = shown.evaluations
    assert scored.tables[0].rows == directions_table(document).rows
    assert scored.title.startswith("24 pairs of ")
    assert scored.note == ""
    for headline, way in zip(shown.headlines, document["subsets"], strict=True):
        assert headline.value == f"{100 * document['subsets'][way]['recall@1']:.1f} %"
        assert "trained on" not in headline.detail


def test_the_recipe_is_told_and_its_file_runs_the_same_again(report: RunReport, recipe: Recipe) -> None:
    table = report.recipe
    assert table is not None
    assert table.stages == ["warmup", "bridge", "contrastive"]
    rows, defaults = dict(table.rows), dict(table.defaults)
    assert rows["probe_rows"] == ["–", "4", "64"]
    assert rows["learning_rate"] == ["0.001", "0.001", "2e-05"]
    assert defaults["mask_ratio"] == ["–", "0.7", "–"]
    assert ("prompts.query", "find: ") in table.whole
    again = Recipe.parse(yaml.safe_load(table.yaml))
    assert again.stages == recipe.stages
    for stage in recipe.stages:
        assert again.sources_of(stage) == recipe.sources_of(stage)
        ours, theirs = (each.section(stage).model_dump(exclude={"data"}) for each in (again, recipe))
        assert ours == theirs
    assert again.model_dump(exclude={"data", *recipe.stages}) == recipe.model_dump(exclude={"data", *recipe.stages})


def test_the_data_of_each_stage_are_what_it_has_read(report: RunReport, scene_folder: Path) -> None:
    assert report.data is not None
    rows = {stage.stage: stage for stage in report.data.stages}
    assert rows["contrastive"].sources == [("data", f"folder {scene_folder}; limit: 9", 9)]
    assert rows["bridge"].sources[0][1] == f"folder {scene_folder}; captions: captions; paraphrases: 1"
    assert rows["bridge"].rows > rows["warm-up"].rows > 24
    assert report.data.bad == 0


def test_rows_that_were_left_out_are_listed(copy: Path, unscored: None) -> None:
    lines = [{"subset": "data", "source": f"row {number}", "reason": "<is broken>"} for number in range(40)]
    (copy / "bad_rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = run_report(read_run(copy), Asked())
    assert shown.data is not None
    assert shown.data.bad == 40
    page = render_report(shown)
    assert "40 rows were left out" in page
    assert "the first 12 of 40" in page
    assert "&lt;is broken&gt;" in page


def test_a_run_in_progress_shows_what_is_finished_and_names_what_is_not(copy: Path) -> None:
    shutil.rmtree(copy / "contrastive")
    shown = run_report(read_run(copy), Asked())
    assert any("contrastive stage is not finished" in alert for alert in shown.alerts)
    assert [curve.stage for curve in shown.curves] == ["warm-up", "bridge"]
    assert "no finished contrastive stage" in shown.evaluations[0].note
    assert "bridge" in shown.evaluations[0].title
    shutil.rmtree(copy / "bridge")
    shutil.rmtree(copy / "warmup")
    bare = run_report(read_run(copy), Asked())
    assert len(bare.alerts) == 3
    assert bare.recipe is not None
    assert bare.evaluations == []
    assert "not finished" in render_report(bare)
    with pytest.raises(UsageError, match="no finished stage"):
        run_report(read_run(copy), Asked(pairs=copy))


def test_data_that_have_gone_leave_out_the_scores_and_say_so(copy: Path) -> None:
    known = json.loads((copy / "data.json").read_text())
    known["contrastive"]["sources"]["data"]["folder"] = "gone/for/good"
    (copy / "data.json").write_text(json.dumps(known))
    shown = run_report(read_run(copy), Asked())
    assert shown.evaluations == shown.galleries == shown.headlines == []
    (alert,) = shown.alerts
    assert "gone/for/good does not exist" in alert
    assert "--pairs" in alert
    assert "galleries" not in re.findall(r'<section id="(\w+)"', render_report(shown))


def test_data_that_have_changed_are_not_called_those_that_were_trained_on(copy: Path) -> None:
    known = json.loads((copy / "data.json").read_text())
    known["contrastive"]["sources"]["data"]["limit"] = 8
    (copy / "data.json").write_text(json.dumps(known))
    (scored,) = run_report(read_run(copy), Asked()).evaluations
    assert scored.title == "The first 8 rows of what the contrastive stage's data are now"
    assert "no longer as they were" in scored.note


def test_a_run_of_an_earlier_version_is_shown_as_far_as_it_tells(copy: Path, unscored: None) -> None:
    known = json.loads((copy / "data.json").read_text())
    for stage in known.values():
        del stage["sources"]
    (copy / "data.json").write_text(json.dumps(known))
    for stage in ("warmup", "bridge"):
        (copy / stage / SAMPLES_FILE).unlink()
    shown = run_report(read_run(copy), Asked())
    assert len([alert for alert in shown.alerts if "left no samples" in alert]) == 2
    assert shown.patches == shown.tokens == []
    assert shown.data is not None
    assert shown.data.stages[2].sources[0][1].startswith("folder ")


def test_samples_that_could_not_be_made_are_told(copy: Path, unscored: None) -> None:
    document = json.loads((copy / "warmup" / SAMPLES_FILE).read_text())
    document |= {"failure": "an image has gone", "patches": [], "tokens": []}
    (copy / "warmup" / SAMPLES_FILE).write_text(json.dumps(document))
    shown = run_report(read_run(copy), Asked())
    assert shown.alerts == ["The warm-up stage could not leave samples behind: an image has gone."]


def pairs_document(name: str = "ours") -> dict[str, Any]:
    metrics = dict.fromkeys(("recall@1", "recall@5", "recall@10", "hit@1", "hit@5", "hit@10", "mrr", "ndcg@10"), 0.5)
    return {
        "benchmark": "pairs",
        "model": name,
        "subsets": {"text_to_image": metrics},
        "intervals": {"text_to_image": {metric: [0.4, 0.6] for metric in metrics}},
        "counts": {"text_to_image": {"queries": 3, "documents": 4, "groups": 3}},
        "level": 0.95,
        "resamples": 10,
        "seed": 0,
    }


def test_results_in_the_runs_folder_are_taken_without_asking_and_others_when_asked(
    copy: Path, tmp_path: Path, unscored: None
) -> None:
    (copy / "eval").mkdir()
    (copy / "eval" / "pairs.json").write_text(json.dumps(pairs_document("inside")))
    (copy / "eval" / "other.json").write_text("{}")
    (tmp_path / "given.json").write_text(json.dumps(pairs_document("given")))
    asked = [tmp_path / "given.json", copy / "eval" / "pairs.json"]
    shown = run_report(read_run(copy), Asked(evaluations=asked))
    assert [evaluation.title for evaluation in shown.evaluations] == ["Pairs: given", "Pairs: inside"], "each once"
    assert [alert for alert in shown.alerts if "other.json is no result of cocoa-embed eval" in alert]


def test_mmeb_is_shown_with_what_was_not_run_marked_as_such(tmp_path: Path) -> None:
    metrics = dict.fromkeys(("precision@1", "hit@5", "hit@10", "mrr", "ndcg@10"), 0.25)
    result = {"metrics": metrics, **dict.fromkeys(TOLD, 0), "rows": 8, "rows_in_data": 8, "partial": False}
    documents = {
        "none": summary("ours", "f", {}, dict.fromkeys(SUBSETS, "not asked for")),
        "one": summary("ours", "f", {"GQA": result}, dict.fromkeys(set(SUBSETS) - {"GQA"}, "not asked for")),
    }
    found = {}
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
        found[name] = read_evaluation(tmp_path / f"{name}.json")
    evaluation, headlines = found["one"]
    assert evaluation.title == "MMEB-V1: ours"
    assert [table.title for table in evaluation.tables] == ["Averages", "Subsets"]
    assert [(headline.value, headline.detail) for headline in headlines] == [
        ("25.0 %", "ours. Not complete: 1 of 36 subsets.")
    ]
    assert found["none"][1] == []
    page = render_report(RunReport("mmeb", "", evaluations=[evaluation]))
    assert page.count("not run: not asked for") == 35


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmark": "pairs"}', '{"benchmark": ["x"]}', '{"benchmark": 3}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(text)
    with pytest.raises(CocoaError, match=r"pairs\.json is no result of cocoa-embed eval"):
        read_evaluation(file)
    with pytest.raises(CocoaError, match="cannot be read"):
        read_evaluation(tmp_path / "missing.json")


def wrong_folders(finished: Path, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    return {
        "missing": (tmp_path / "nothing", "does not exist"),
        "file": (tmp_path / "file", "is a file"),
        "empty": (tmp_path / "empty", "is no training run: it has no recipe.json"),
        "above": (finished.parent, f"did you mean {finished}"),
        "stage": (finished / "bridge", f"is a single model, not a run; name the run, {finished}"),
    }


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "above", "stage"])
def test_what_is_no_run_is_refused_in_a_sentence(kind: str, finished: Path, tmp_path: Path, command: Command) -> None:
    folder, words = wrong_folders(finished, tmp_path)[kind]
    code, out, err = command(folder)
    assert code == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("cocoa-embed: ")]
    assert words in line


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("recipe.json", "{", "recipe.json cannot be read"),
        ("recipe.json", "[]", "recipe.json is no JSON object"),
        ("data.json", '{"warmup": 3}', "data.json is not as a run writes it"),
        ("bad_rows.jsonl", "{}\n", "bad_rows.jsonl cannot be read"),
        ("bridge/log.json", "{", "log.json cannot be read"),
        ("bridge/log.json", "[3]", "log.json is no list of log lines"),
        (f"bridge/{TRAINING_FILE}", "{", "is not JSON"),
        ("bridge/samples.json", "{", "samples.json is broken"),
    ],
)
def test_a_broken_file_of_the_run_is_named(copy: Path, unscored: None, name: str, text: str, words: str) -> None:
    (copy / name).write_text(text)
    with pytest.raises(CocoaError, match=re.escape(words)):
        run_report(read_run(copy), Asked())


def test_the_command_writes_into_the_run_and_says_where(copy: Path, command: Command, unscored: None) -> None:
    code, out, err = command(copy)
    assert (code, out) == (0, "")
    assert err.strip().endswith(f"wrote {copy / 'report.html'}")
    assert (copy / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_where_the_page_cannot_go_is_told_before_anything_is_scored(copy: Path, command: Command) -> None:
    code, _, err = command(copy, "--out", copy)
    assert code == 2
    assert "is a folder; give --out the name of a file" in err
    (copy / "plain").write_text("")
    code, _, err = command(copy, "--out", copy / "plain" / "report.html")
    assert code == 1
    assert "cannot be made" in err


def test_images_without_pairs_are_refused(copy: Path, command: Command) -> None:
    code, _, err = command(copy, "--images", copy)
    assert code == 2
    assert "give --pairs too" in err


@needs_chromium
def test_a_browser_shows_the_page_whole_at_the_width_of_a_phone(
    report: RunReport, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps(pairs_document("a/model/with/a/long/name" * 4)))
    evaluation, _ = read_evaluation(tmp_path / "pairs.json")
    geometry = {name: [(1, 0.5), (2, 0.25)] for name in ("alignment", "uniformity", "modality_gap", "effective_rank")}
    curves = [replace(curve, series={**curve.series, **geometry}) for curve in report.curves]
    alerts = ["The contrastive stage is not finished."]
    full = replace(report, evaluations=[*report.evaluations, evaluation], curves=curves, alerts=alerts)
    page = render_report(full)
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    shown = seen({"phone": (390, page), "desktop": (1280, page)}, tmp_path)
    for name, width in (("phone", 390), ("desktop", 1280)):
        assert shown[name]["width"] <= width
        assert {"evaluations", "galleries", "curves", "patches", "bridge", "plateau", "words", "diagnostics", "recipe",
                "data", "run"} == {*shown[name]["sections"]}  # fmt: skip
        assert shown[name]["decoded"] == shown[name]["images"] > 50
    assert requested(tmp_path / "report.html", tmp_path) == set()


def test_the_page_is_written_whole(copy: Path, tmp_path: Path, unscored: None) -> None:
    page = write_run_report(copy, Asked(), tmp_path / "new" / "page.html")
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
