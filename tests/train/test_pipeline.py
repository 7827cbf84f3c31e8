import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from exported import PROMPTS, contents
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.folders import RUN_MARKER
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.model.training_record import RUN_FILE, TRAINING_FILE, read_run, read_training
from cocoa_embed.train.loop.run_record import StageResult
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.plan import checks as preparation
from cocoa_embed.train.recipe import STAGES, Recipe
from conftest import SCENES, TINY_MAX_LENGTH

Values = dict[str, Any]

STAGE: Values = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1}
FROZEN: Values = {**STAGE, "steps": 1, "warmup_steps": 1}
"""One step at the warm-up's first learning rate, which is 0: the stage ends with the weights it began with."""


PROBED_ACCURACIES = ("accuracy_matching_image", "accuracy_shuffled_image", "accuracy_no_image")
GEOMETRY = ("alignment", "uniformity", "modality_gap", "effective_rank")


def recipe(backbone: Path | str, data: Path | None, **values: Any) -> Recipe:
    given = {"name": "test", "backbone": str(backbone), "max_length": TINY_MAX_LENGTH, "prompts": PROMPTS, **values}
    return Recipe.parse(given if data is None else {**given, "data": {"folder": str(data)}})


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_backbone(str(folder), max_length=TINY_MAX_LENGTH).model.state_dict()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


class Run(NamedTuple):
    recipe: Recipe
    out: Path
    results: list[StageResult]
    inspected: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tiny_backbone_path: Path, scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of all three stages, in eager attention, and what ``inspect`` saw of each trainer."""
    inspected: dict[str, dict[str, Any]] = {}

    def inspect(stage: str, trainer: Trainer) -> None:
        model = trainer.model
        backbone = model[0].auto_model if isinstance(model, SentenceTransformer) else model.backbone
        inspected[stage] = {
            "steps": trainer.state.global_step,
            "has pixel decoder": hasattr(model, "pixel_decoder"),
            "attention": backbone.config._attn_implementation,
        }

    stages = {
        "warmup": STAGE,
        "bridge": {**STAGE, "probe_rows": 4, "probe_steps": 1},
        "contrastive": {**STAGE, "probe_steps": 1, "data": {"folder": str(scene_folder), "limit": 10}},
    }
    given = recipe(tiny_backbone_path, scene_folder, attn_implementation="eager", seed=3, **stages)
    out = tmp_path_factory.mktemp("run") / "out"
    return Run(given, out, run(given, out, inspect=inspect), inspected)


def test_the_stages_run_in_order_and_leave_their_checkpoints(finished: Run) -> None:
    assert [result.stage for result in finished.results] == list(STAGES) == ["warmup", "bridge", "contrastive"]
    assert [result.folder for result in finished.results] == [finished.out / stage for stage in STAGES]
    assert [result.steps for result in finished.results] == [2, 2, 2]
    assert sorted(path.name for path in finished.out.iterdir()) == sorted([RUN_MARKER, RUN_FILE, *STAGES])
    for stage in STAGES:
        assert {"model.safetensors", "config.json", "tokenizer.json", TRAINING_FILE} <= {
            path.name for path in (finished.out / stage).iterdir()
        }


def test_each_checkpoint_tells_the_stages_up_to_it(finished: Run) -> None:
    for number, stage in enumerate(STAGES, start=1):
        training = read_training(finished.out / stage)
        assert Recipe.parse(training["recipe"]) == finished.recipe
        assert [entry["stage"] for entry in training["stages"]] == list(STAGES[:number])
        assert [entry["steps"] for entry in training["stages"]] == [2] * number
        assert [entry["rows"] for entry in training["stages"]] == [SCENES, SCENES, 10][:number]
        for entry, result in zip(training["stages"], finished.results, strict=False):
            assert entry["final"] == pytest.approx(result.final)


def test_each_stage_logs_its_losses(finished: Run) -> None:
    parts = {
        "warmup": {"loss", "mntp_loss", "mae_loss", "masked_token_accuracy"},
        "bridge": {"loss", "masked_token_accuracy", *PROBED_ACCURACIES, *GEOMETRY},
        "contrastive": {"loss", *GEOMETRY},
    }
    for stage, names in parts.items():
        lines = [line for line in read_run(finished.out)["stages"][stage]["log"] if "loss" in line]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(names <= line.keys() for line in lines)
        assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)


def test_inspect_sees_each_trainer_when_its_stage_has_ended(finished: Run) -> None:
    assert list(finished.inspected) == list(STAGES)
    assert [seen["steps"] for seen in finished.inspected.values()] == [2, 2, 2]
    assert [seen["has pixel decoder"] for seen in finished.inspected.values()] == [True, False, False]


def test_every_stage_runs_the_recipes_attention(finished: Run) -> None:
    assert finished.recipe.attn_implementation == "eager"
    assert {stage: seen["attention"] for stage, seen in finished.inspected.items()} == dict.fromkeys(STAGES, "eager")


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_reloads_bidirectional_in_the_stock_class(finished: Run, stage: str) -> None:
    for implementation in ("eager", "sdpa"):
        model, info = Qwen2VLForConditionalGeneration.from_pretrained(
            finished.out / stage, attn_implementation=implementation, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"], "the pixel decoder is thrown away"
        assert_bidirectional(model)


def test_the_last_stage_exports(finished: Run, tmp_path: Path) -> None:
    out = export_model(finished.results[-1].folder, tmp_path / "cocoa-qwen2vl")
    model = SentenceTransformer(str(out), device="cpu")
    assert model.prompts == PROMPTS
    assert model.encode([{"text": "a red ring"}]).shape == (1, 32)
    assert equal(weights(out), weights(finished.out / "contrastive"))


# From stage to stage


@pytest.mark.parametrize(("first", "second"), [("warmup", "bridge"), ("bridge", "contrastive")])
def test_a_stage_starts_from_the_weights_of_the_one_before(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, first: str, second: str
) -> None:
    results = run(recipe(tiny_backbone_path, scene_folder, **{first: STAGE, second: FROZEN}), tmp_path / "out")
    assert [result.stage for result in results] == [first, second]
    before, between, after = (weights(folder) for folder in (tiny_backbone_path, *(r.folder for r in results)))
    assert not equal(before, between), "the first stage trains"
    assert equal(between, after), "the second, at a learning rate of 0, ends where it began"


def test_a_stage_left_out_is_not_run(tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    given = recipe(tiny_backbone_path, scene_folder, contrastive=FROZEN)
    results = run(given, tmp_path / "out", inspect=lambda stage, trainer: seen.append(stage))
    assert seen == [result.stage for result in results] == ["contrastive"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        RUN_MARKER,
        "contrastive",
        RUN_FILE,
    ]
    assert equal(weights(tiny_backbone_path), weights(tmp_path / "out" / "contrastive"))


def test_a_seed_gives_the_same_weights_twice_and_another_gives_others(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    runs: dict[str, list[dict[str, Tensor]]] = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        given = recipe(tiny_backbone_path, scene_folder, seed=seed, **dict.fromkeys(STAGES, STAGE))
        torch.rand(seed + len(runs))  # whatever was drawn before must not matter
        runs[name] = [weights(result.folder) for result in run(given, tmp_path / name)]
    for first, again, other in zip(runs["a"], runs["b"], runs["c"], strict=True):
        assert equal(first, again)
        assert not equal(first, other)


# Wrong input


def test_a_recipe_without_a_stage_is_refused(tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no stage; give at least one of warmup, bridge, contrastive"):
        run(recipe(tiny_backbone_path, scene_folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage_without_data_is_refused_by_name(tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path) -> None:
    stages = {"warmup": {**STAGE, "data": {"folder": str(scene_folder)}}, "bridge": STAGE}
    with pytest.raises(UsageError, match=r"stage bridge, data: no data; give one of data\.folder, data\.file"):
        run(recipe(tiny_backbone_path, None, **stages), tmp_path / "out")
    assert not (tmp_path / "out").exists(), "no stage has run before the fault is told"


def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CocoaError, match="holds something else"):
        run(recipe(tiny_backbone_path, scene_folder, warmup=STAGE), tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def earlier_run(out: Path) -> Path:
    out.mkdir()
    (out / RUN_MARKER).write_text("{}")
    (out / "warmup").mkdir()
    (out / "warmup" / "stale.txt").write_text("of the earlier run")
    return out


def test_an_earlier_run_is_replaced(tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path) -> None:
    out = earlier_run(tmp_path / "out")
    run(recipe(tiny_backbone_path, scene_folder, warmup={**STAGE, "steps": 1}), out)
    assert not (out / "warmup" / "stale.txt").exists()
    assert read_training(out / "warmup")["stages"][0]["stage"] == "warmup"


@pytest.mark.parametrize(
    ("backbone", "values", "message"),
    [
        ("scene-captoner", {}, "scene-captoner"),
        ("empty", {}, "empty"),
        ("scene-captioner", {"max_length": 16}, "raise max_length"),
        ("scene-captioner", {"mixed_precision": "bf16"}, "stage warmup: no bf16 here"),
    ],
)
def test_a_run_that_cannot_start_leaves_the_earlier_run_as_it_is(
    scene_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backbone: str,
    values: Values,
    message: str,
) -> None:
    """Hours of training must not be lost to a misspelt name."""

    def without_bf16(**arguments: Any) -> TrainingArguments:
        if arguments["bf16"]:
            raise ValueError("no bf16 here")
        return TrainingArguments(**arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "TrainingArguments", without_bf16)
    (tmp_path / "empty").mkdir()
    out = earlier_run(tmp_path / "out")
    before = contents(out)
    given = {"backbone": backbone, "max_length": TINY_MAX_LENGTH, "data": {"folder": str(scene_folder)}, **values}
    with pytest.raises(CocoaError, match=message):
        run(Recipe.parse({"name": "test", "warmup": STAGE, **given}), out)
    assert contents(out) == before


def test_a_folder_with_a_run_json_of_someone_elses_is_no_earlier_run(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RUN_FILE).write_text('{"flour": "500 g"}')
    before = contents(tmp_path / "out")
    with pytest.raises(CocoaError, match="holds something else"):
        run(recipe(tiny_backbone_path, scene_folder, warmup=STAGE), tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_the_stage_at_its_step(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, stage: str
) -> None:
    diverging = {**STAGE, "steps": 6, "learning_rate": 1e30, "logging_steps": 6}
    with pytest.raises(CocoaError, match=r"loss of step [2-6] is (nan|inf); lower learning_rate \(1e\+30\)"):
        run(recipe(tiny_backbone_path, scene_folder, **{stage: diverging}), tmp_path / "out")
    assert not (tmp_path / "out" / stage / TRAINING_FILE).exists()


def test_a_run_from_a_checkpoint_inherits_its_settings_and_records_all_stages(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = {**STAGE, "steps": 1, "learning_rate": 0.25, "warmup_steps": 1}
    kept = {"max_pixels": 1568, "bidirectional": False}
    run(recipe(tiny_backbone_path, scene_folder, **kept, warmup=first), tmp_path / "first")
    assert "inherited" not in caplog.text
    start = tmp_path / "first" / "warmup"
    second = Recipe.parse({"name": "second", "backbone": str(start), "data": {"folder": str(scene_folder)},
                           "max_pixels": 3136, "contrastive": STAGE})  # fmt: skip
    run(second, tmp_path / "second")
    inherited = {"prompts": PROMPTS, "max_length": TINY_MAX_LENGTH, "bidirectional": False}
    told = ", ".join(f"{key} {json.dumps(value)}" for key, value in inherited.items())
    assert f"inherited from {start}: {told}\n" in caplog.text
    training = read_training(tmp_path / "second" / "contrastive")
    assert {key: training["recipe"][key] for key in inherited} == inherited
    assert training["recipe"]["max_pixels"] == 3136, "what the recipe gives itself stays"
    processor = load_backbone(str(tmp_path / "second" / "contrastive")).processor
    assert processor.image_processor.size["longest_edge"] == 3136
    assert processor.tokenizer.model_max_length == TINY_MAX_LENGTH
    assert SentenceTransformer(str(tmp_path / "second" / "contrastive"), device="cpu").prompts == PROMPTS
    assert (training["backbone"], training["origin"]) == (str(tiny_backbone_path), "folder")
    assert [(entry["stage"], entry["steps"], entry["learning_rate"]) for entry in training["stages"]] == [
        ("warmup", 1, 0.25),
        ("contrastive", 2, 1e-3),
    ]
    assert training["data"].count(f"{SCENES} rows") == 2


@pytest.mark.parametrize("steps", [4, 5, 7])
def test_the_last_step_is_logged_and_probed_whatever_the_intervals(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, steps: int
) -> None:
    bridge = {**STAGE, "steps": steps, "logging_steps": 2, "probe_rows": 4, "probe_steps": 3}
    (result,) = run(recipe(tiny_backbone_path, scene_folder, bridge=bridge), tmp_path / "out")
    probed = [line["step"] for line in result.log if "accuracy_shuffled_image" in line]
    assert probed == {4: [4], 5: [4, 5], 7: [4, 7]}[steps]


@pytest.mark.parametrize(("probe_rows", "warns"), [(12, False), (13, True), (0, False)])
def test_too_few_images_for_the_probe_are_told(
    tiny_backbone_path: Path,
    scene_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    probe_rows: int,
    warns: bool,
) -> None:
    bridge = {**STAGE, "steps": 1, "probe_rows": probe_rows}
    (result,) = run(recipe(tiny_backbone_path, scene_folder, bridge=bridge), tmp_path / "out")
    assert ("Lower bridge.probe_rows" in caplog.text) is warns
    assert ("accuracy_shuffled_image" in result.final) is (probe_rows == 12)


def test_bf16_trains_on_this_machine(tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path) -> None:
    given = recipe(tiny_backbone_path, scene_folder, mixed_precision="bf16", **dict.fromkeys(STAGES, STAGE))
    for result in run(given, tmp_path / "out"):
        assert all(value.dtype == torch.float32 for value in weights(result.folder).values())
        assert result.final["loss"] > 0


@pytest.mark.parametrize("held", ["backbone", "data"])
def test_an_output_folder_that_holds_what_the_run_reads_is_refused(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, held: str
) -> None:
    """To go on from an earlier run's stage, into that run's folder, would delete what it starts from."""
    out = earlier_run(tmp_path / "out")
    read = {"backbone": tiny_backbone_path, "data": scene_folder}
    read[held] = Path(shutil.copytree(read[held], out / held))
    before = contents(out)
    with pytest.raises(CocoaError, match="which the run reads"):
        run(recipe(read["backbone"], read["data"], contrastive=STAGE), out)
    assert contents(out) == before


def test_log_lines_go_to_tensorboard_too(tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path) -> None:
    given = recipe(tiny_backbone_path, scene_folder, report_to=["tensorboard"], warmup=STAGE, contrastive=STAGE)
    run(given, tmp_path / "out")
    for stage in ("warmup", "contrastive"):
        events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / stage)).Reload()
        assert {"train/loss", "train/grad_norm", "train/tokens_per_second", "train/mfu"} <= set(
            events.Tags()["scalars"]
        )
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_where_log_lines_cannot_go_is_told_before_the_run(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    assert find_spec("trackio") is None
    given = recipe(tiny_backbone_path, scene_folder, report_to=["trackio"], warmup=STAGE)
    with pytest.raises(UsageError, match="trackio, which is not installed; run: pip install trackio"):
        run(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_trained_and_merged(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, stage: str, kind: str
) -> None:
    adapted = {**STAGE, "adapter": {"kind": kind, "r": 2, "alpha": 4}, "freeze_vision": True}
    run(recipe(tiny_backbone_path, scene_folder, **{stage: adapted}), tmp_path / "out")
    before, after = weights(tiny_backbone_path), weights(tmp_path / "out" / stage)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers." in name and "visual" not in name for name in changed)


def assert_checkpointing(expected: bool, stage: str, trainer: Trainer) -> None:
    model = trainer.model
    backbone = model[0].auto_model if isinstance(model, SentenceTransformer) else model.backbone
    assert backbone.is_gradient_checkpointing is expected, stage


def test_gradients_checkpointed_are_those_kept(tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path) -> None:
    outcomes = []
    for checkpointed in (False, True):
        out = tmp_path / str(checkpointed)
        stages = {"warmup": STAGE, "bridge": STAGE, "contrastive": {**STAGE, "mini_batch_size": 2}}
        given = recipe(tiny_backbone_path, scene_folder, gradient_checkpointing=checkpointed, **stages)
        run(given, out, inspect=partial(assert_checkpointing, checkpointed))
        outcomes.append([weights(out / stage) for stage in STAGES])
    for kept, anew in zip(*outcomes, strict=True):
        assert all(torch.allclose(kept[name], anew[name], atol=1e-6) for name in kept)
