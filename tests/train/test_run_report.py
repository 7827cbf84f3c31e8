"""The report of a training run, from outside: a run made small, its page, and every way to ask for it wrongly."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from browser import needs_chromium, requested, seen

from cocoa_embed.cli import main as cli
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.report.content import Evaluation, Gallery, Hit, QueryResult, RunReport, TokenReconstruction
from cocoa_embed.report.page import render_report
from cocoa_embed.report.tables import Table
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.run_report.content import Asked, run_report, write_run_report
from cocoa_embed.train.run_report.finished_run import read_run
from cocoa_embed.train.stages.samples import SAMPLES_FILE
from conftest import STAGE, TINY_MAX_LENGTH


@pytest.fixture(scope="module")
def report(finished: Path) -> RunReport:
    return run_report(read_run(finished), Asked())


@pytest.fixture
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes long: no model is loaded."""
    monkeypatch.setattr("cocoa_embed.train.run_report.content._scores", lambda *_: None)


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
    assert "accuracy_matching_image" in report.curves[1].series
    assert len(report.patches) == 8
    assert [shown.stage for shown in report.tokens] == ["warm-up"] * 8 + ["bridge"] * 4
    assert "kept out" in report.sample_notes["bridge"]
    assert "warm-up before it draws its training from the same data" in report.sample_notes["bridge"]
    assert "draws its training from these rows" in report.sample_notes["warm-up"], "8 of many rows were drawn"
    assert report.bridge_mask is not None
    assert [gallery.title for gallery in report.galleries] == [
        f"{way}: the {which} queries" for way in ("Image to text", "Text to image") for which in ("worst", "best")
    ]
    assert dict(report.facts)["backbone"] == json.loads((finished / "recipe.json").read_text())["backbone"]


def test_the_recipe_is_told_and_its_file_runs_the_same_again(report: RunReport, small_recipe: Recipe) -> None:
    recipe = small_recipe
    table = report.recipe
    assert table is not None
    assert table.stages == ["warm-up", "bridge", "contrastive"]
    rows, defaults = dict(table.rows), dict(table.defaults)
    assert rows["probe_rows"] == ["–", "4", "64"]
    assert rows["learning_rate"] == ["0.001", "0.001", "2e-05"]
    assert defaults["mask_ratio"] == ["–", "0.7", "–"]
    assert ("prompts.query", "find: ") in table.whole
    again = Recipe.parse(yaml.safe_load(table.yaml))
    assert list(again.stages) == list(recipe.stages)
    for stage in recipe.stages:
        assert again.sources_of(stage) == recipe.sources_of(stage)
        ours, theirs = (each.stages[stage].settings.model_dump(exclude={"data"}) for each in (again, recipe))
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
    assert shown.evaluations == shown.galleries == [], "it may be using the machine"
    assert any("--pairs" in alert for alert in shown.alerts)
    shutil.rmtree(copy / "bridge")
    shutil.rmtree(copy / "warmup")
    bare = run_report(read_run(copy), Asked())
    assert len(bare.alerts) == 3
    assert bare.recipe is not None
    assert bare.evaluations == []
    assert "not finished" in render_report(bare)
    with pytest.raises(UsageError, match="no finished stage"):
        run_report(read_run(copy), Asked(pairs=copy))


def test_a_stage_in_progress_shows_its_curves_as_far_as_its_checkpoint(copy: Path) -> None:
    run = read_run(copy)
    *finished, last = run.results
    under_way = replace(run, results=finished, missing={last.stage: 1}, unfinished=[replace(last, log=last.log[:1])])
    shown = run_report(under_way, Asked())
    assert [curve.stage for curve in shown.curves] == ["warm-up", "bridge", "contrastive"]
    assert [len(points) for points in shown.curves[-1].series.values()] == [1] * len(shown.curves[-1].series)
    assert any("checkpoint is of step 1, as far as its curves go" in alert for alert in shown.alerts)


def test_a_stage_whose_folder_was_removed_is_told_as_finished(copy: Path, unscored: None) -> None:
    shutil.rmtree(copy / "warmup")
    shown = run_report(read_run(copy), Asked())
    assert any("warm-up stage is finished, but its folder has gone" in alert for alert in shown.alerts)
    assert not any("warm-up" in alert and ("not finished" in alert or "samples" in alert) for alert in shown.alerts)


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--images", "."), "give --pairs too"),
        (("--no-scores", "--pairs", "."), "--no-scores and --pairs do not go together"),
        (("--device", "nonsense"), "--device nonsense cannot be used"),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(
    finished: Path, tmp_path: Path, command: Command, options: tuple[str, ...], words: str
) -> None:
    code, out, err = command(finished, "--out", tmp_path / "page.html", *options)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("cocoa-embed: ")]
    assert words in line
    assert "Traceback" not in err


def test_without_scores_no_model_is_loaded(copy: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cocoa_embed.train.run_report.content.score_run", lambda *_, **__: pytest.fail("it was scored"))
    code, _, _ = command(copy, "--no-scores", "--device", "nonsense")
    assert code == 0
    assert "galleries" not in re.findall(r'<section id="(\w+)"', (copy / "report.html").read_text(encoding="utf-8"))


def test_a_run_is_called_by_its_folders_own_name(
    copy: Path, monkeypatch: pytest.MonkeyPatch, scene_folder: Path
) -> None:
    monkeypatch.chdir(copy)
    shown = run_report(read_run(Path()), Asked())
    assert [table.title for table in shown.evaluations[0].tables] == ["small/contrastive"]
    assert dict(shown.facts)["run"] == str(copy)


def test_the_data_tell_how_much_was_drawn_and_what_was_kept_out(report: RunReport) -> None:
    assert report.data is not None
    stages = {stage.stage: stage for stage in report.data.stages}
    assert {name: stage.kept_out for name, stage in stages.items()} == {"warm-up": 0, "bridge": 4, "contrastive": 0}
    assert stages["bridge"].notes == ["8 drawn: 2 steps of 4, too few to be sure of each row"]
    assert re.search(r"rows, 4 images of them kept out", render_report(report))


def test_a_run_on_text_alone_that_was_left_causal_is_told_as_such(tiny_backbone_path: Path, tmp_path: Path) -> None:
    pairs = [{"query_text": f"what is {number}", "positive_text": f"{number} is a number"} for number in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = Recipe.parse(
        {
            "name": "words",
            "backbone": str(tiny_backbone_path),
            "max_length": TINY_MAX_LENGTH,
            "bidirectional": False,
            "data": {"file": str(tmp_path / "pairs.jsonl")},
            "warmup": {**STAGE, "steps": 1},
            "bridge": {**STAGE, "probe_rows": 0},
        }
    )
    run(recipe, tmp_path / "run")
    shown = run_report(read_run(tmp_path / "run"), Asked())
    assert shown.alerts == []
    assert not shown.pictures
    assert shown.headlines == []
    assert shown.evaluations[0].title == "The first 8 rows that the bridge stage was trained on", "8 were drawn of 8"
    assert "not part of this run" in shown.evaluations[0].note
    page = render_report(shown)
    words = re.sub(r"<(?!EOS)[^>]*>|\s+", " ", page[page.index("<main>") :])
    for saying in ("the image", "an image", "caption", "looking both ways", "contrastive stage pulls"):
        assert saying not in words
    assert 'class="leak"' not in page


def test_long_texts_are_cut_in_the_page(report: RunReport) -> None:
    long = "word " * 10_000
    query = QueryResult(long, long, None, [Hit(None, 0.5, long, False)], expected=f"not {long}")
    page = render_report(replace(report, galleries=[Gallery("worst", "", [query])], evaluations=[]))
    assert "word " * 40 in page
    assert "word " * 80 not in page
    assert "title=" not in page


@needs_chromium
def test_a_browser_shows_the_page_whole_at_the_width_of_a_phone(
    report: RunReport, finished: Path, tmp_path: Path
) -> None:
    long = "x" * 400
    table = Table("a/model/with/a/long/name" * 4, ("metric", "text to image"), [(long, "0.5")], notes=[long])
    evaluation = Evaluation(long, long, [table])
    geometry = {name: [(1, 0.5), (2, 0.25)] for name in ("alignment", "uniformity", "modality_gap", "effective_rank")}
    curves = [replace(curve, series={**curve.series, **geometry}) for curve in report.curves]
    alerts = ["The contrastive stage is not finished."]
    query = QueryResult(long, long, None, [Hit(None, 0.5, long, False)], expected=f"not {long}")
    words = TokenReconstruction([long] * 2, [False, True], [long, f"{long}y"], "bridge")
    assert report.data is not None
    full = replace(
        report,
        facts=[*report.facts, (long, long), ("short", long)],
        evaluations=[*report.evaluations, evaluation],
        galleries=[*report.galleries, Gallery(long, long, [query, replace(query, hits=[])])],
        tokens=[*report.tokens, words],
        data=replace(report.data, bad=1, shown_bad=[(long, long, long)]),
        curves=curves,
        alerts=[*alerts, long],
    )
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
