"""Two runs of a command with one output folder: the second is refused, and changes nothing of the first."""

from pathlib import Path

import pytest
from command_line import Command
from exported import contents

from cocoa_embed import demo
from cocoa_embed.captioning.run import JOURNAL
from cocoa_embed.demo.pretrain.run import MARKER, pretrain
from cocoa_embed.demo.pretrain.settings import read_settings
from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import LOCK_FILE, RUN_MARKER, only_writer
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.train import Recipe

REFUSED = "another run is writing to"


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_train(command: Command, small_recipe: Recipe, copy: Path, tmp_path: Path, resume: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small_recipe.model_dump_json(exclude_unset=True))
    with only_writer(copy, marker=RUN_MARKER):
        before = contents(copy)
        assert REFUSED in command("train", recipe, "--out", copy, *resume).error()
        assert contents(copy) == before


def test_a_plan_is_made_while_the_run_writes(
    command: Command, small_recipe: Recipe, copy: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small_recipe.model_dump_json(exclude_unset=True))
    with only_writer(copy, marker=RUN_MARKER):
        assert command("train", recipe, "--out", copy, "--dry-run", "--resume").status == 0


def test_export(command: Command, copy: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path / "model", marker=TRAINING_FILE):
        assert REFUSED in command("export", copy / "bridge", tmp_path / "model").error()
        assert set(contents(tmp_path / "model")) == {LOCK_FILE}


def test_caption(command: Command, scene_folder: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path / "out", marker=JOURNAL):
        (tmp_path / "out" / JOURNAL).touch()
        before = contents(tmp_path / "out")
        arguments = ("caption", scene_folder, "--out", tmp_path / "out", "--with", "scene-captioner", "--yes")
        assert REFUSED in command(*arguments).err
        assert contents(tmp_path / "out") == before


def test_demo(command: Command, tmp_path: Path) -> None:
    with only_writer(tmp_path / "work", marker=demo.MARKER):
        (tmp_path / "work" / demo.MARKER).touch()
        before = contents(tmp_path / "work")
        assert REFUSED in command("demo", "--work", tmp_path / "work", "--out", tmp_path / "model").error()
        assert contents(tmp_path / "work") == before


@pytest.mark.parametrize("resume", [False, True])
def test_pretrain(tmp_path: Path, resume: bool) -> None:
    with only_writer(tmp_path, marker=MARKER):
        (tmp_path / MARKER).touch()
        before = contents(tmp_path)
        with pytest.raises(CocoaError, match=REFUSED):
            pretrain(read_settings([], data="scenes"), tmp_path, resume=resume)
        assert contents(tmp_path) == before
