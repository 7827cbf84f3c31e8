"""Errors for a folder that is no run, no checkpoint, or a stage that is not finished."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.folders import RUN_MARKER
from cocoa_embed.model.export import export_model
from cocoa_embed.model.loading import check_model
from cocoa_embed.model.training_record import (
    RUN_FILE,
    TRAINING_FILE,
    read_run,
    read_training,
    refuse_unfinished,
    run_of,
    write_run,
)
from cocoa_embed.train.diagnosis import diagnose
from cocoa_embed.train.loop.run_record import read_start


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that stopped in its first stage."""
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints" / "warmup" / "checkpoint-13").mkdir(parents=True)
    (run / RUN_MARKER).touch()
    stages = {stage: {"finished": False, "step": 13, "steps": 60} for stage in ("warmup", "bridge")}
    write_run(run, {"stages": stages})
    return run


@pytest.mark.parametrize("part", ["warmup", "checkpoints/warmup/checkpoint-13"])
@pytest.mark.parametrize("read", [diagnose, check_model, lambda path: export_model(path, path / "out"), read_start])
def test_an_unfinished_stage_is_refused_with_its_step_and_the_command_that_continues(
    stopped: Path, part: str, read: Callable[[Path], object]
) -> None:
    words = f"stage warmup of that run stopped at step 13 of 60; `cocoa-embed train RECIPE --out {stopped} --resume`"
    with pytest.raises(CocoaError, match=re.escape(words)):
        read(stopped / part if read is not read_start else str(stopped / part))


def test_snapshots_and_finished_stages_are_not_unfinished(stopped: Path) -> None:
    kept = stopped / "warmup" / "step-5"
    kept.mkdir(parents=True)
    (kept / TRAINING_FILE).write_text("{}")
    refuse_unfinished(kept)
    write_run(stopped, {"stages": {"warmup": {"finished": True}}})
    refuse_unfinished(stopped / "warmup")
    with pytest.raises(CocoaError, match="is not a checkpoint: it needs"):
        read_training(stopped / "warmup")


def test_a_folder_that_is_no_run_is_refused_with_the_run_that_it_is_part_of(stopped: Path, tmp_path: Path) -> None:
    part = stopped / "checkpoints" / "warmup"
    for folder, words in (
        (tmp_path / "nothing", "does not exist; name the --out of cocoa-embed train"),
        (tmp_path, "is not a training run: it has no run.json; name the --out of cocoa-embed train"),
        (part, f"it is part of the run {stopped}"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            read_run(folder)
    assert run_of(part / "checkpoint-13" / "deeper") is None, "three folders deep"


@pytest.mark.parametrize("text", ['{"status": "COMPLETED"}', "[1]", '{"version": 1}'])
def test_another_programs_run_json_next_to_a_model_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(RUN_FILE).write_text(text)
    check_model("sentence-transformers/clip-ViT-B-32")
    assert read_start("scene-captioner").origin == "built-in"


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        (RUN_FILE, "{", "cannot be read"),
        (RUN_FILE, '{"version": 2}', "has version 2, but this cocoa-embed reads 1"),
        (TRAINING_FILE, "[]", "is not a JSON object"),
        (TRAINING_FILE, '{"stages": []}', "lacks one of"),
    ],
)
def test_a_broken_record_is_named(stopped: Path, file: str, text: str, reason: str) -> None:
    (stopped / file).write_text(text)
    (stopped / "model.safetensors").touch()
    with pytest.raises(CocoaError, match=rf"{re.escape(file)}.*{reason}"):
        (read_run if file == RUN_FILE else read_training)(stopped)
