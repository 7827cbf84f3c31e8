"""``cocoa-embed report``: from the folder of a run to its page, without torch."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_records import pairs_document

from cocoa_embed.cli import main as cli
from cocoa_embed.cli.report import is_of_run
from cocoa_embed.model.export import export_model
from cocoa_embed.model.training_record import TRAINING_FILE, read_run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["report", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def test_the_page_of_a_real_run_has_every_part_and_goes_into_the_run(copy: Path, command: Command) -> None:
    code, out, err = command(copy)
    assert (code, out) == (0, "")
    assert err.strip() == f"wrote {copy / 'report.html'}"
    page = (copy / "report.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["curves", "patches", "bridge", "plateau", "words", "measures", "recipe", "data", "run"]
    assert "<title>small</title>" in page
    assert "alerts" not in page[page.index("<body>") :]


def test_results_inside_the_run_are_added_and_each_is_shown_once(copy: Path, tmp_path: Path, command: Command) -> None:
    inside, given = copy / "eval" / "pairs.json", tmp_path / "given.json"
    inside.parent.mkdir()
    inside.write_text(json.dumps(pairs_document(str(copy / "contrastive"))))
    given.write_text(json.dumps(pairs_document("owner/name")))
    code, _, _ = command(copy, "--eval", given, "--eval", inside, "--out", tmp_path / "new" / "page.html")
    assert code == 0
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert re.findall(r"<h3>(Pairs|Another model): (.*)</h3>", page) == [
        ("Another model", "owner/name"),
        ("Pairs", str(copy / "contrastive")),
    ]
    assert page.count("of queries have a right answer in first place") == 1
    assert not (copy / "report.html").exists()


def test_pairs_that_the_run_was_trained_on_are_not_put_first(copy: Path, scene_folder: Path, command: Command) -> None:
    data = {"path": str(scene_folder / ".." / scene_folder.name), "images": None, "columns": {}}
    (copy / "pairs.json").write_text(json.dumps(pairs_document(str(copy / "contrastive"), data=data)))
    command(copy)
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "These are training data of warmup, bridge and contrastive:" in page
    assert "of queries have a right answer in first place" not in page


def test_a_model_is_of_the_run_that_it_lies_in_or_was_exported_from(finished: Path, tmp_path: Path) -> None:
    export_model(finished / "contrastive", tmp_path / "exported")
    shutil.copytree(tmp_path / "exported", tmp_path / "strange")
    training = json.loads((tmp_path / "strange" / TRAINING_FILE).read_text())
    (tmp_path / "strange" / TRAINING_FILE).write_text(json.dumps({**training, "run": "another"}))
    record = read_run(finished)
    found = [
        is_of_run(Path(model), finished, record)
        for model in (finished / "bridge", tmp_path / "exported", tmp_path / "strange", "owner/name", "no\0path")
    ]
    assert found == [True, True, False, False, False]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmark": "pairs"}', '{"benchmark": ["x"]}', '{"benchmark": 3}'])
def test_a_file_that_is_no_result_is_named(finished: Path, tmp_path: Path, command: Command, text: str) -> None:
    (tmp_path / "pairs.json").write_text(text)
    code, _, err = command(finished, "--eval", tmp_path / "pairs.json", "--out", tmp_path / "page.html")
    assert code == 1
    assert "pairs.json is no result of cocoa-embed eval; give a pairs.json or mmeb.json" in err


def test_what_cannot_be_read_or_written_is_one_sentence(copy: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "plain").write_text("")
    for arguments, words, status in (
        ((tmp_path / "nothing",), "does not exist", 2),
        ((copy / "bridge",), f"it is part of the run {copy}", 2),
        ((copy, "--out", copy), "is a folder; give --out the name of a file", 2),
        ((copy, "--out", tmp_path / "plain" / "report.html"), "cannot be made", 1),
        ((copy, "--eval", tmp_path / "missing.json"), "missing.json cannot be read", 1),
    ):
        code, out, err = command(*arguments)
        (line,) = err.splitlines()
        assert (code, out) == (status, "")
        assert line.startswith("cocoa-embed: ")
        assert words in line


def test_no_model_library_is_loaded(copy: Path) -> None:
    (copy / "pairs.json").write_text(json.dumps(pairs_document()))
    script = f"""
import sys
from cocoa_embed.cli.main import main
try:
    main(["report", {str(copy)!r}])
finally:
    assert not {{"torch", "transformers", "accelerate"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
