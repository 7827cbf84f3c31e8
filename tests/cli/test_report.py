"""``cocoa-embed report``: from the folder of a run to its page, without torch."""

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import Command, modules_of_command
from run_records import pairs_document

from cocoa_embed.cli.report import is_of_run
from cocoa_embed.model.export import export_model
from cocoa_embed.model.training_record import TRAINING_FILE, read_run

HEADLINE = "of queries have a right answer in first place"


def test_the_page_of_a_real_run_has_every_part_and_goes_into_the_run_without_torch(copy: Path) -> None:
    done, modules = modules_of_command(["report", str(copy)], copy)
    assert done == (0, "", f"wrote {copy / 'report.html'}\n")
    assert not {"torch", "transformers", "accelerate"} & modules
    page = (copy / "report.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["curves", "patches", "bridge", "plateau", "words", "measures", "recipe", "data", "run"]
    assert "<title>small</title>" in page
    assert "alerts" not in page[page.index("<body>") :]


def test_results_inside_the_run_are_added_once_and_those_of_training_data_not_put_first(
    copy: Path, scene_folder: Path, tmp_path: Path, command: Command
) -> None:
    inside, given = copy / "eval" / "pairs.json", tmp_path / "given.json"
    inside.parent.mkdir()
    inside.write_text(json.dumps(pairs_document(str(copy / "contrastive"))))
    given.write_text(json.dumps(pairs_document("owner/name")))
    out = tmp_path / "new" / "page.html"
    assert command("report", copy, "--eval", given, "--eval", inside, "--out", out).status == 0
    page = out.read_text(encoding="utf-8")
    shown = re.findall(r"<h3>(Pairs|Another model): (.*)</h3>", page)
    assert shown == [("Another model", "owner/name"), ("Pairs", str(copy / "contrastive"))]
    assert page.count(HEADLINE) == 1
    data = {"path": str(scene_folder / ".." / scene_folder.name), "images": None, "columns": {}}
    inside.write_text(json.dumps(pairs_document(str(copy / "contrastive"), data=data)))
    assert command("report", copy, "--out", out).status == 0
    page = out.read_text(encoding="utf-8")
    assert "These are training data of warmup, bridge and contrastive:" in page
    assert HEADLINE not in page
    assert not (copy / "report.html").exists()


def test_a_model_belongs_to_the_run_that_holds_it_or_that_it_was_exported_from(finished: Path, tmp_path: Path) -> None:
    export_model(finished / "contrastive", tmp_path / "exported")
    shutil.copytree(tmp_path / "exported", tmp_path / "strange")
    training = json.loads((tmp_path / "strange" / TRAINING_FILE).read_text())
    (tmp_path / "strange" / TRAINING_FILE).write_text(json.dumps({**training, "run": "another"}))
    models = (finished / "bridge", tmp_path / "exported", tmp_path / "strange", "owner/name", "no\0path")
    found = [is_of_run(Path(model), finished, read_run(finished)) for model in models]
    assert found == [True, True, False, False, False]


@pytest.mark.parametrize("text", ["", "[]", '{"benchmark": "pairs"}', '{"benchmark": ["x"]}'])
def test_a_file_that_is_not_a_result_is_named(finished: Path, tmp_path: Path, command: Command, text: str) -> None:
    (tmp_path / "pairs.json").write_text(text)
    error = command("report", finished, "--eval", tmp_path / "pairs.json", "--out", tmp_path / "page.html").error()
    assert "pairs.json is not a result of cocoa-embed eval; give a pairs.json or mmeb.json" in error


def test_what_cannot_be_read_or_written_is_reported_in_one_sentence(
    copy: Path, tmp_path: Path, command: Command
) -> None:
    for arguments, words in (
        ((copy / "bridge",), f"it is part of the run {copy}"),
        ((copy, "--out", copy), "small cannot be written"),
        ((copy, "--eval", tmp_path / "missing.json"), "missing.json cannot be read"),
    ):
        assert words in command("report", *arguments).error()
