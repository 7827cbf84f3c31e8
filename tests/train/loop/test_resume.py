"""An interrupted run resumes, and ends with the weights and logs of an uninterrupted one."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from interrupted import Killed, acting_at, die, killed_at, same_weights
from safetensors.torch import load_file, save_file
from tiny_backbones import COCOA, MakeRecipe
from transformers import TrainerControl, TrainerState

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.training_record import read_run
from cocoa_embed.train import pipeline
from cocoa_embed.train.data import mixture
from cocoa_embed.train.loop import callbacks, trainer
from cocoa_embed.train.loop.callbacks import SaveAndStop, Stopped
from cocoa_embed.train.loop.checkpoints import newest_complete
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import AdapterSettings, DataSettings

STEPS = 5
STAGE: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "logging_steps": 2,
    "save_steps": 2,
}

Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def recipe(tiny_recipe: MakeRecipe) -> Recipe:
    # Dropout draws from the state that a checkpoint must restore; two steps make an epoch.
    adapter = {"kind": "lora", "r": 2, "alpha": 4, "dropout": 0.1}
    contrastive = {"data": {"limit": 8}, "directions": "forward", "mini_batch_tokens": 60, "adapter": adapter}
    bridge = {"data": {"paraphrases": 1}, "probe_rows": 4, "probe_steps": 1, "mini_batch_size": 2}
    return tiny_recipe(warmup=STAGE, bridge={**STAGE, **bridge}, contrastive={**STAGE, **contrastive})


def only(recipe: Recipe, *stages: str, **changes: Any) -> Recipe:
    """Return the recipe with these stages alone."""
    return recipe.model_copy(update={**dict.fromkeys(set(COCOA) - set(stages)), **changes})


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return the folder of an uninterrupted run of one stage, trained once for all tests.

    ``resume`` begins a run that has not begun.
    """

    @cache
    def trained(stage: str) -> Path:
        out = tmp_path_factory.mktemp("whole") / "out"
        run(only(recipe, stage), out, resume=True)
        return out

    return trained


def assert_same(out: Path, whole: Path, stage: str) -> None:
    assert same_weights(out / stage, whole / stage)
    found, expected = (read_run(folder)["stages"][stage]["log"] for folder in (out, whole))
    last, expected_last = ([line["loss"] for line in log if "loss" in line][-1] for log in (found, expected))
    assert last == expected_last
    assert found[-1]["step"] == STEPS
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


def cases(default: tuple[Any, ...], *others: tuple[Any, ...]) -> list[Any]:
    """Return a case of the default suite, and others for the slow one."""
    return [default, *(pytest.param(*other, marks=pytest.mark.slow) for other in others)]


def newest_step(out: Path, stage: str) -> int | None:
    newest = newest_complete(out / "checkpoints" / stage)
    return None if newest is None else int(newest.name.removeprefix("checkpoint-"))


@pytest.mark.parametrize(
    ("stage", "step"),
    cases(("bridge", 3), *((stage, step) for stage in COCOA for step in (1, 3, 5) if (stage, step) != ("bridge", 3))),
)
def test_a_run_killed_at_a_step_resumes_to_the_same_weights(
    recipe: Recipe, whole: Whole, tmp_path: Path, stage: str, step: int
) -> None:
    given, out = only(recipe, stage), tmp_path / "out"
    with killed_at(step):
        run(given, out)
    assert not (out / stage).exists(), "the stage is not finished"
    assert newest_step(out, stage) == {1: None, 3: 2, 5: 4}[step], "a step's checkpoint is written after it"
    run(given, out, resume=True)
    assert_same(out, whole(stage), stage)


def write_half(weights: dict[str, torch.Tensor], path: str, **values: Any) -> None:
    save_file(weights, path, **values)
    if "checkpoint-4" in path:
        os.truncate(path, os.path.getsize(path) // 2)
        raise Killed


@pytest.mark.parametrize(
    ("stage", "module", "function", "fail", "newest"),
    cases(
        ("contrastive", pipeline, "write_record", die, STEPS),
        ("warmup", pipeline, "write_record", die, STEPS),
        ("bridge", pipeline, "write_record", die, STEPS),
        ("bridge", trainer, "mark_complete", die, None),
        ("bridge", shutil, "rmtree", die, 4),
        *((stage, trainer, "save_file", write_half, 2) for stage in COCOA),
    ),
)
def test_a_run_killed_while_it_writes_resumes_to_the_same_weights(
    recipe: Recipe,
    whole: Whole,
    tmp_path: Path,
    stage: str,
    module: ModuleType,
    function: str,
    fail: Callable[..., None],
    newest: int | None,
) -> None:
    """A half-written checkpoint is not used. Before the training record, no step is left to train."""
    given, out = only(recipe, stage), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, fail)
        with pytest.raises(Killed):
            run(given, out)
    assert newest_step(out, stage) == newest
    run(given, out, resume=True)
    assert_same(out, whole(stage), stage)


@pytest.mark.parametrize(
    ("stage", "kind", "trained"), [("warmup", "dora", ("lora_", "pixel_decoder")), ("contrastive", "lora", ("lora_",))]
)
def test_a_checkpoint_of_an_adapter_has_no_frozen_weights_and_resumes_to_the_same_weights(
    recipe: Recipe, tmp_path: Path, stage: str, kind: str, trained: tuple[str, ...]
) -> None:
    """In bfloat16, with dropout: the weights that are merged into are those of the stage's start."""
    settings = getattr(recipe, stage)
    adapter = AdapterSettings.model_validate({"kind": kind, "r": 1})
    changed = settings.model_copy(update={"adapter": adapter})
    given = only(recipe, stage, mixed_precision="bf16", **{stage: changed})
    run(given, tmp_path / "whole")
    with killed_at(3):
        run(given, tmp_path / "out")
    checkpoint = newest_complete(tmp_path / "out" / "checkpoints" / stage)
    assert checkpoint is not None
    weights = load_file(checkpoint / "model.safetensors")
    assert all(any(part in name for part in trained) for name in weights)
    assert all(any(part in name for name in weights) for part in trained)
    saved = sum(path.stat().st_size for path in checkpoint.iterdir())
    adapted, others = sum(value.nbytes for value in weights.values()), 120_000  # names, digests, random states
    assert saved < 3 * adapted + others, "the weights and two moments of Adam"
    assert others < (tmp_path / "whole" / stage / "model.safetensors").stat().st_size / 3
    run(given, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", tmp_path / "whole", stage)


def test_a_checkpoint_of_an_adapter_is_refused_with_other_frozen_weights(
    recipe: Recipe, tiny_backbone_path: Path, tmp_path: Path
) -> None:
    backbone = Path(shutil.copytree(tiny_backbone_path, tmp_path / "backbone"))
    given = only(recipe, "contrastive", backbone=str(backbone))
    with killed_at(3):
        run(given, tmp_path / "out")
    weights = load_file(backbone / "model.safetensors")
    save_file({**weights, (name := max(weights)): weights[name] + 1}, backbone / "model.safetensors", {"format": "pt"})
    with pytest.raises(CocoaError, match=r"checkpoint-2.* do not belong to the model .* without --resume"):
        run(given, tmp_path / "out", resume=True)


def sending(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "name", "status"), cases((signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143))
)
def test_a_signal_saves_a_checkpoint_and_stops_and_the_run_resumes(
    recipe: Recipe, whole: Whole, tmp_path: Path, number: int, name: str, status: int
) -> None:
    given, out = only(recipe, "bridge"), tmp_path / "out"
    before = signal.getsignal(number)
    # Python handles the signal during the next step.
    where = f"Stopped by {name} at step 3 of 5 of stage bridge; .* --resume"
    with acting_at(2, sending(number)), pytest.raises(Stopped, match=where) as stopped:
        run(given, out)
    assert stopped.value.exit_status == status
    assert signal.getsignal(number) is before
    assert newest_step(out, "bridge") == 3
    run(given, out, resume=True)
    assert_same(out, whole("bridge"), "bridge")


def test_workers_outlive_a_signal_to_all_processes_and_end_with_the_run(recipe: Recipe, tmp_path: Path) -> None:
    def to_all() -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGINT)
        sending(signal.SIGINT)()

    with acting_at(2, to_all), pytest.raises(Stopped, match="at step 3 of 5") as stopped:
        run(only(recipe, "bridge", workers=2), tmp_path / "out")
    assert not multiprocessing.active_children(), f"{stopped.traceback} does not keep them"


def test_a_second_ctrl_c_ends_at_once(recipe: Recipe, tmp_path: Path) -> None:
    def twice() -> None:
        sending(signal.SIGINT)()
        time.sleep(0)  # Python handles a signal between two instructions
        sending(signal.SIGINT)()

    with acting_at(3, twice), pytest.raises(KeyboardInterrupt):
        run(only(recipe, "bridge"), tmp_path / "out")
    assert newest_step(tmp_path / "out", "bridge") == 2


def test_a_checkpoint_is_saved_by_time_and_resumed_to_the_same_weights(
    recipe: Recipe, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step takes four minutes: after the third, ten have passed."""
    given, out = only(recipe, "bridge"), tmp_path / "out"
    assert given.bridge is not None
    given = only(given, "bridge", bridge=given.bridge.model_copy(update={"save_steps": 500}))
    clock = iter(range(0, 10**6, 4 * 60))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with killed_at(5):
        run(given, out)
    assert newest_step(out, "bridge") == 3
    saved, real = [], trainer.mark_complete
    monkeypatch.setattr(trainer, "mark_complete", lambda path, **facts: (saved.append(path.name), real(path, **facts)))
    run(only(recipe, "bridge"), out, resume=True)
    assert saved[0] == "checkpoint-4", "save_steps is now 2"
    assert_same(out, whole("bridge"), "bridge")


def test_processes_save_by_the_clock_of_the_first_and_stop_at_a_signal_of_any() -> None:
    seen: list[list[list[int]]] = []
    gathered = {"num_processes": 2, "device": "cpu", "gather": lambda own: torch.tensor(seen.pop(0))}
    callback = SaveAndStop(SimpleNamespace(accelerator=SimpleNamespace(**gathered)), minutes=10)
    seen += [[[0, 0], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [signal.SIGINT, 0]]]
    state, found = TrainerState(max_steps=9), []
    for _ in range(len(seen)):
        control = TrainerControl()
        callback.on_step_end(None, state, control)
        found.append((control.should_save, control.should_training_stop))
    assert found == [(False, False), (True, False), (True, True)]
    assert callback.requested == signal.SIGINT


def test_a_signal_that_arrives_while_processes_agree_counts_at_the_next_step() -> None:
    arriving = [signal.SIGTERM]

    def gather(own: torch.Tensor) -> torch.Tensor:
        if arriving:
            signal.raise_signal(arriving.pop())
        return own

    accelerator = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
    callback = SaveAndStop(SimpleNamespace(accelerator=accelerator), minutes=None)
    stops = []
    with callback.listening():
        for _ in range(2):
            control = TrainerControl()
            callback.on_step_end(None, TrainerState(max_steps=9), control)
            stops.append(control.should_training_stop)
    assert stops == [False, True]


def test_sigterm_in_the_last_step_of_a_stage_stops_before_the_next(recipe: Recipe, tmp_path: Path) -> None:
    given, out = only(recipe, "warmup", "bridge"), tmp_path / "out"
    with (
        acting_at(STEPS, sending(signal.SIGTERM), "warmup"),
        pytest.raises(Stopped, match="at the end of stage warmup"),
    ):
        run(given, out)
    assert (out / "warmup").is_dir()
    assert not (out / "bridge").exists()
    resumed: list[str] = []
    results = run(given, out, resume=True, inspect=lambda stage, trainer: resumed.append(stage))
    assert resumed == ["bridge"]
    assert [result.stage for result in results] == ["warmup", "bridge"]


@pytest.mark.slow
def test_settings_without_effect_on_the_weights_may_change_on_resume(
    recipe: Recipe, whole: Whole, tmp_path: Path
) -> None:
    given, out = only(recipe, "bridge"), tmp_path / "out"
    with killed_at(3):
        run(given, out)
    assert given.bridge is not None
    changed = given.bridge.model_copy(update={"mini_batch_size": 4})
    run(only(given, "bridge", bridge=changed, gradient_checkpointing=True), out, resume=True)
    found, expected = (load_file(folder / "bridge" / "model.safetensors") for folder in (out, whole("bridge")))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)


def test_a_finished_run_is_not_run_again(small_recipe: Recipe, copy: Path) -> None:
    results = run(small_recipe, copy, resume=True, inspect=lambda stage, trainer: pytest.fail(f"{stage} ran again"))
    assert [result.stage for result in results] == list(COCOA)
    assert all(result.final["loss"] > 0 for result in results)


def test_a_changed_recipe_is_refused_with_its_differences(recipe: Recipe, whole: Whole) -> None:
    assert recipe.bridge is not None
    changed = only(recipe, "bridge", seed=7, bridge=recipe.bridge.model_copy(update={"learning_rate": 0.5}))
    with pytest.raises(UsageError, match=r"bridge\.learning_rate: 0\.001 -> 0\.5; seed: 0 -> 7"):
        run(changed, whole("bridge"), resume=True)


def test_a_run_stopped_by_a_missing_image_resumes_without_it(
    recipe: Recipe, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rows that it began with, from which a row that it had left out stays left out, and without a cache."""
    monkeypatch.setattr(mixture, "BAD_ROW_LIMIT", 0.5)
    data, out = Path(shutil.copytree(scene_folder, tmp_path / "scenes")), tmp_path / "out"
    first, second, *_ = sorted(data.glob("*.png"))
    first.write_bytes(b"no image")
    settings = DataSettings(folder=data, on_bad_row="skip")
    given = only(recipe, "warmup", data=settings)
    with killed_at(3):
        run(given, out)
    second.unlink()
    monkeypatch.setenv("COCOA_CACHE", str(tmp_path / "cache"))
    stopping = only(recipe, "warmup", data=settings.model_copy(update={"on_bad_row": "stop"}))
    with pytest.raises(CocoaError, match=r"data\.on_bad_row=skip"):
        run(stopping, out, resume=True)
    (result,) = run(given, out, resume=True)
    assert (result.steps, result.rows) == (STEPS, 23)
    assert read_run(out)["stages"]["warmup"]["finished"]


def test_changed_rows_are_refused(recipe: Recipe, scene_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(scene_folder, tmp_path / "scenes"))
    assert recipe.data is not None
    given = only(recipe, "bridge", data=recipe.data.model_copy(update={"folder": data}))
    with killed_at(1):
        run(given, tmp_path / "out")
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UsageError, match="rows of stage bridge have changed"):
        run(given, tmp_path / "out", resume=True)
