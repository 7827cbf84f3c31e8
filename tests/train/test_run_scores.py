"""What the report scores a run's model on, what it says of those rows, and what it puts first."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from fake_model import COLOURS, FakeModel
from PIL import Image

from cocoa_embed.cli import main as cli
from cocoa_embed.data.rows import Item
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.pairs import Pair, evaluate_pairs
from cocoa_embed.evaluation.pairs_tables import directions_table
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.report.page import render_report
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.run_report.content import Asked, run_report
from cocoa_embed.train.run_report.finished_run import read_run
from cocoa_embed.train.run_report.rows import read_own_rows
from cocoa_embed.train.run_report.scores import direction_headlines, stage_note
from conftest import STAGE, TINY_MAX_LENGTH


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder that no run has seen."""
    folder = tmp_path_factory.mktemp("held-out") / "scenes"
    write_image_folder(folder, "held-out", 6, seed=1)
    return folder


@pytest.fixture(scope="module")
def bridge_run(finished: Path, scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the bridge alone, from the warm-up of another run."""
    out = tmp_path_factory.mktemp("runs") / "bridge-only"
    recipe = {
        "name": "bridge-only",
        "backbone": str(finished / "warmup"),
        "max_length": TINY_MAX_LENGTH,
        "data": {"folder": str(scene_folder)},
        "bridge": {**STAGE, "probe_rows": 4},
    }
    run(Recipe.parse(recipe), out)
    return out


def change_data(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    known = json.loads((folder / "data.json").read_text())
    change(known["contrastive"]["sources"]["data"])
    (folder / "data.json").write_text(json.dumps(known))


def test_rows_of_the_runs_own_are_called_what_they_are_and_make_no_headline(finished: Path) -> None:
    shown = run_report(read_run(finished), Asked())
    (scored,) = shown.evaluations
    assert scored.title == "The first 9 rows that the contrastive stage draws from", "8 were drawn, of 9 in two ways"
    assert "rows that the model draws its training from" in scored.note
    assert "no longer" not in scored.note
    assert "not checked" not in scored.note
    assert shown.headlines == []
    assert shown.galleries
    assert {len(table.rows) for table in scored.tables} == {6}


def test_rows_that_were_all_drawn_are_said_to_be_trained_on(copy: Path) -> None:
    record = json.loads((copy / "contrastive" / TRAINING_FILE).read_text())
    record["stages"][-1]["steps"] = 5
    (copy / "contrastive" / TRAINING_FILE).write_text(json.dumps(record))
    (scored,) = run_report(read_run(copy), Asked()).evaluations
    assert scored.title == "The first 9 rows that the contrastive stage was trained on"


def test_pairs_are_scored_as_eval_pairs_scores_them(finished: Path, held_out: Path, tmp_path: Path) -> None:
    shown = run_report(read_run(finished), Asked(pairs=held_out))
    arguments = ["eval", "pairs", str(held_out), "--model", str(finished / "contrastive"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    document = json.loads((tmp_path / "pairs.json").read_text())
    (scored,) = shown.evaluations
    assert scored.tables[0].rows == directions_table(document).rows
    assert scored.title.startswith("6 pairs of ")
    assert scored.note == "None of them is among the rows that the run draws from."
    for headline, way in zip(shown.headlines, document["subsets"], strict=True):
        assert headline.value == f"{100 * document['subsets'][way]['hit@1']:.1f} %"


def test_pairs_that_the_run_draws_from_are_counted_and_make_no_headline(
    finished: Path, held_out: Path, scene_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(held_out, folder)
    first = json.loads((scene_folder / "metadata.jsonl").read_text().splitlines()[0])
    (folder / "again.png").symlink_to(scene_folder / first["file_name"])
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write(json.dumps({"file_name": "again.png", "text": "other words"}) + "\n")
    shown = run_report(read_run(finished), Asked(pairs=folder))
    assert "1 of 7 are among the rows that the run draws its training from" in shown.evaluations[0].note
    assert shown.headlines == []


def test_where_training_rows_cannot_be_read_it_is_said_that_nothing_can_be_told(copy: Path, held_out: Path) -> None:
    change_data(copy, lambda source: source.update(folder=None, hub="owner/name"))
    shown = run_report(read_run(copy), Asked(pairs=held_out))
    assert "the contrastive stage (its rows are of the data set owner/name" in shown.evaluations[0].note
    assert "cannot be told" in shown.evaluations[0].note
    assert all("not known for certain" in headline.detail for headline in shown.headlines)
    assert len(shown.headlines) == 2


def test_a_headline_counts_a_query_with_any_right_answer_first(tmp_path: Path) -> None:
    pairs = []
    for colour in COLOURS:
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
        pairs += [Pair(Item(text), Item(image=str(tmp_path / f"{colour}.png"))) for text in (colour, f"so {colour}")]
    document = evaluate_pairs([Encoder(FakeModel())], pairs)
    assert document["subsets"]["image_to_text"]["recall@1"] == 0.5, "one of two right answers can be first"
    for headline in direction_headlines(document, ""):
        assert headline.value == "100.0 %"
        assert headline.meaning == "of queries have a right answer in first place"
        assert "100.0 to 100.0 %" in headline.detail, "its own interval"


def test_a_bridge_that_comes_last_is_scored_on_what_it_kept_out(bridge_run: Path) -> None:
    own = read_own_rows(read_run(bridge_run))
    assert own.kept_out
    assert own.is_same
    assert [Path(str(row.image)).name for row in own.rows] == [f"{number:05}.png" for number in range(4)]
    shown = run_report(read_run(bridge_run), Asked())
    (scored,) = shown.evaluations
    assert scored.title == "The 4 rows that the bridge stage kept out of its training"
    assert "not part of this run" in scored.note
    assert "What came before this run (warm-up) may have been trained on them" in scored.note
    assert all("not known for certain" in headline.detail for headline in shown.headlines)
    assert dict(shown.facts)["trained before this run"] == "warm-up"
    assert "may have been trained on them" in shown.sample_notes["bridge"]
    page = render_report(shown)
    assert "<strong>warm-up</strong>" not in page
    assert "contrastive</strong> stage pulls" not in page
    assert "three times" in page, "with no image too"


def test_a_stage_after_an_earlier_contrastive_one_is_not_called_untrained(bridge_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bridge_run, tmp_path / "run"))
    assert "has not been trained to retrieve" in stage_note(read_run(folder), "bridge")
    record = json.loads((folder / "bridge" / TRAINING_FILE).read_text())
    record["stages"][0]["stage"] = "contrastive"
    (folder / "bridge" / TRAINING_FILE).write_text(json.dumps(record))
    note = stage_note(read_run(folder), "bridge")
    assert "A contrastive stage came before this run" in note
    assert "not been trained" not in note


def test_images_inside_parquet_are_scored_and_shown(
    tiny_backbone_path: Path, scene_folder: Path, held_out: Path, tmp_path: Path
) -> None:
    entries = [json.loads(line) for line in (scene_folder / "metadata.jsonl").read_text().splitlines()[:6]]
    columns = {
        "query_text": [entry["text"] for entry in entries],
        "positive_image": [(scene_folder / entry["file_name"]).read_bytes() for entry in entries],
    }
    parquet.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    recipe = {
        "name": "inside",
        "backbone": str(tiny_backbone_path),
        "max_length": TINY_MAX_LENGTH,
        "data": {"file": str(tmp_path / "pairs.parquet")},
        "contrastive": {"steps": 1, "batch_size": 4, "warmup_steps": 0, "logging_steps": 1},
    }
    run(Recipe.parse(recipe), tmp_path / "run")
    shown = run_report(read_run(tmp_path / "run"), Asked())
    assert shown.evaluations[0].title == "The first 6 rows that the contrastive stage draws from"
    assert any(hit.image is not None for gallery in shown.galleries for hit in gallery.queries[0].hits)
    again = run_report(read_run(tmp_path / "run"), Asked(pairs=tmp_path / "pairs.parquet"))
    assert "6 of 6 are among the rows" in again.evaluations[0].note, "by their texts"


def test_no_more_of_other_data_is_read_than_is_needed_and_that_is_said(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {side: [f"{side} {number}" for number in range(1000)] for side in ("query_text", "positive_text")}
    (tmp_path / "set").mkdir()
    parquet.write_table(pa.table(texts), tmp_path / "set" / "train.parquet")
    change_data(copy, lambda source: (source.clear(), source.update(hub=str(tmp_path / "set"))))
    monkeypatch.setattr("cocoa_embed.train.run_report.rows._read_whole", lambda *_: pytest.fail("all was read"))
    own = read_own_rows(read_run(copy))
    assert own.is_same is None
    assert [row.query.text for row in own.rows] == texts["query_text"][:200]


def test_data_on_the_hub_are_not_fetched_for_a_page(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_data(copy, lambda source: source.update(folder=None, hub="owner/name"))
    monkeypatch.setattr(
        "cocoa_embed.train.data.sources.open_data_set", lambda *_: pytest.fail("the network was opened")
    )
    (alert,) = run_report(read_run(copy), Asked()).alerts
    assert "no network is opened for a page" in alert


def test_too_little_memory_is_told_with_what_to_change(
    finished: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr("cocoa_embed.encode.encoder.Encoder.embed_queries", short)
    for asked in (Asked(pairs=held_out), Asked()):
        try:
            (told,) = run_report(read_run(finished), asked).alerts
        except CocoaError as error:
            told = str(error)
        assert "does not fit into the memory of" in told
        assert "--batch-tokens" in told
        assert "--no-scores" in told


def test_data_that_have_gone_leave_out_the_scores_and_say_so(copy: Path) -> None:
    change_data(copy, lambda source: source.update(folder="gone/for/good"))
    shown = run_report(read_run(copy), Asked())
    assert shown.evaluations == shown.galleries == shown.headlines == []
    (alert,) = shown.alerts
    assert "gone/for/good does not exist" in alert
    assert "--pairs" in alert
    assert "galleries" not in re.findall(r'<section id="(\w+)"', render_report(shown))


def test_data_that_have_changed_are_not_called_those_that_were_trained_on(copy: Path) -> None:
    change_data(copy, lambda source: source.update(limit=8))
    (scored,) = run_report(read_run(copy), Asked()).evaluations
    assert scored.title == "The first 8 rows of what the contrastive stage's data are now"
    assert "no longer as they were" in scored.note
