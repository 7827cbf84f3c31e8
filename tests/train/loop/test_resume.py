"""A run that was ended, wherever that was, goes on and ends as if it never had been."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from transformers import Trainer, TrainerCallback

from cocoa_embed.errors import UsageError
from cocoa_embed.model.training_record import read_run
from cocoa_embed.train import pipeline
from cocoa_embed.train.loop import trainer
from cocoa_embed.train.loop.checkpoints import newest_complete
from cocoa_embed.train.loop.stopping import Stopped
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.recipe import STAGES, Recipe
from conftest import TINY_MAX_LENGTH

STEPS = 5
STAGE: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "logging_steps": 2,
    "save_steps": 2,
}

Kill = Callable[[str, str, int], pytest.MonkeyPatch]


def slow(*values: str) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class Killed(BaseException):
    """What no code of ours may catch: the process is gone."""


@pytest.fixture(scope="module")
def recipe(tiny_backbone_path: Path, scene_folder: Path) -> Recipe:
    adapter = {"kind": "lora", "r": 2, "alpha": 4, "dropout": 0.1}
    return Recipe.parse(
        {
            "name": "resumed",
            "backbone": str(tiny_backbone_path),
            "max_length": TINY_MAX_LENGTH,
            "data": {"folder": str(scene_folder)},
            "warmup": STAGE,
            "bridge": {**STAGE, "data": {"paraphrases": 1}, "probe_rows": 4, "probe_steps": 1, "mini_batch_size": 2},
            # Dropout draws from the state that a checkpoint must restore; two steps make an epoch.
            "contrastive": {
                **STAGE,
                "data": {"limit": 8},
                "directions": "forward",
                "mini_batch_size": 2,
                "adapter": adapter,
            },
        }
    )


def outcome(out: Path) -> dict[str, tuple[dict[str, torch.Tensor], list[float]]]:
    losses = {stage: entry["log"] for stage, entry in read_run(out)["stages"].items()}
    return {
        stage: (
            load_file(out / stage / "model.safetensors"),
            [line["loss"] for line in losses[stage] if "loss" in line],
        )
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def uninterrupted(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(recipe, out)
    return out


def assert_same(out: Path, whole: Path) -> None:
    found, expected = outcome(out), outcome(whole)
    for stage in STAGES:
        assert found[stage][0].keys() == expected[stage][0].keys()
        assert all(torch.equal(found[stage][0][name], expected[stage][0][name]) for name in found[stage][0]), stage
        assert found[stage][1][-1] == expected[stage][1][-1], stage
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


class AtStep(TrainerCallback):
    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step = step
        self.act = act

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if args[1].global_step == self.step:
            self.act()


def die() -> None:
    raise Killed


def act_at(patch: pytest.MonkeyPatch, stage: str, step: int, act: Callable[[], None]) -> None:
    show = pipeline.show_progress

    def show_and_act(built: Trainer, name: str, shown: dict[str, str]) -> None:
        show(built, name, shown)
        if name == stage:
            built.add_callback(AtStep(step, act))

    patch.setattr(pipeline, "show_progress", show_and_act)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_killed_at_a_step_ends_as_one_that_was_not(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path, stage: str, step: int
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, stage, step, die)
        with pytest.raises(Killed):
            run(recipe, out)
    assert not (out / stage).exists(), "the stage is not finished"
    saved = newest_complete(out / "checkpoints" / stage)
    assert (saved is None) == (step < 3), "a step's checkpoint is written after it"
    run(recipe, out, resume=True)
    assert_same(out, uninterrupted)


@pytest.mark.parametrize(
    "stage",
    ["bridge", *slow("warmup", "contrastive")],
)
def test_a_half_written_checkpoint_is_never_taken_for_a_whole_one(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path, stage: str
) -> None:
    def write_half(model: torch.nn.Module, path: str) -> None:
        save_model(model, path)
        if stage in path and "checkpoint-4" in path:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            raise Killed

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_model", write_half)
        with pytest.raises(Killed):
            run(recipe, out)
    assert (out / "checkpoints" / stage / "checkpoint-4" / "model.safetensors").is_file()
    newest = newest_complete(out / "checkpoints" / stage)
    assert newest is not None
    assert newest.name == "checkpoint-2"
    run(recipe, out, resume=True)
    assert_same(out, uninterrupted)


@pytest.mark.parametrize(
    "place",
    slow("write_record", "mark_complete", "rmtree"),
)
def test_a_run_killed_between_two_writes_ends_as_one_that_was_not(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path, place: str
) -> None:
    module = {"mark_complete": trainer, "write_record": pipeline, "rmtree": shutil}[place]
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, place, lambda *args, **kwargs: die())
        with pytest.raises(Killed):
            run(recipe, out)
    assert out.is_dir()
    run(recipe, out, resume=True)
    assert_same(out, uninterrupted)


@pytest.mark.parametrize("stage", ["contrastive", *slow("warmup", "bridge")])
def test_a_stage_killed_after_its_last_checkpoint_is_not_trained_on(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path, stage: str
) -> None:
    write = pipeline.write_record

    def die_in_the_stage(*args: Any) -> None:
        if args[2][-1].stage == stage:
            raise Killed
        write(*args)

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_record", die_in_the_stage)
        with pytest.raises(Killed):
            run(recipe, out)
    newest = newest_complete(out / "checkpoints" / stage)
    assert newest is not None
    assert newest.name == f"checkpoint-{STEPS}"
    run(recipe, out, resume=True)
    assert_same(out, uninterrupted)
    steps = [line["step"] for line in read_run(out)["stages"][stage]["log"]]
    assert max(steps) == STEPS


def test_sigterm_saves_and_stops_and_the_run_goes_on(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        # The signal is heard at the end of the step after.
        act_at(patch, "bridge", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="step 3 of 5 of stage bridge; the same command with --resume") as stopped:
            run(recipe, out)
    assert stopped.value.exit_status == 143
    assert signal.getsignal(signal.SIGTERM) is before
    newest = newest_complete(out / "checkpoints" / "bridge")
    assert newest is not None
    assert newest.name == "checkpoint-3"
    run(recipe, out, resume=True)
    assert_same(out, uninterrupted)


def test_sigterm_in_a_stages_last_step_stops_before_the_next(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, "warmup", STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="at the end of stage warmup"):
            run(recipe, out)
    assert (out / "warmup").is_dir()
    assert not (out / "bridge").exists()
    run(recipe, out, resume=True)
    assert_same(out, uninterrupted)


@pytest.mark.slow
def test_how_a_run_fits_a_machine_may_change_on_the_way(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, "bridge", 3, die)
        with pytest.raises(Killed):
            run(recipe, out)
    assert recipe.bridge is not None
    fitted = {"bridge": recipe.bridge.model_copy(update={"mini_batch_size": 4}), "gradient_checkpointing": True}
    run(recipe.model_copy(update=fitted), out, resume=True)
    found, expected = (load_file(folder / "bridge" / "model.safetensors") for folder in (out, uninterrupted))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)


def test_a_finished_run_is_not_run_again(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    results = run(recipe, out, resume=True, inspect=lambda stage, trainer: pytest.fail(f"{stage} ran again"))
    assert [result.stage for result in results] == list(STAGES)
    assert all(result.final["loss"] > 0 for result in results)
    assert_same(out, uninterrupted)


@pytest.mark.slow
def test_a_run_that_has_not_begun_is_begun(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", uninterrupted)


def test_another_recipe_is_refused_and_the_difference_shown(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path
) -> None:
    changed = recipe.model_copy(
        update={"seed": 7, "bridge": recipe.bridge.model_copy(update={"learning_rate": 0.5}) if recipe.bridge else None}
    )
    with pytest.raises(UsageError, match=r"bridge\.learning_rate: 0\.001 -> 0\.5; seed: 0 -> 7"):
        run(changed, uninterrupted, resume=True)


def test_other_rows_are_refused(recipe: Recipe, scene_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "scenes"
    shutil.copytree(scene_folder, data)
    moved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"folder": data}) if recipe.data else None})
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, "bridge", 1, die)
        with pytest.raises(Killed):
            run(moved, tmp_path / "out")
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UsageError, match="rows of stage bridge have changed"):
        run(moved, tmp_path / "out", resume=True)
