import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import PROMPTS, contents
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbones import SCENES, TINY_MAX_LENGTH
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.folders import RUN_MARKER
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.model.training_record import RUN_FILE, TRAINING_FILE, read_run, read_training
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.plan import checks
from cocoa_embed.train.recipe import STAGES, Recipe

Values = dict[str, Any]

STAGE: Values = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1}
FROZEN: Values = {**STAGE, "steps": 1, "warmup_steps": 1}
"""One step at the warm-up's first learning rate, which is 0: the stage ends with the weights it began with."""


def recipe(backbone: Path | str, data: Path | None, **values: Any) -> Recipe:
    given = {"name": "test", "backbone": str(backbone), "max_length": TINY_MAX_LENGTH, "prompts": PROMPTS, **values}
    return Recipe.parse(given if data is None else {**given, "data": {"folder": str(data)}})


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_backbone(str(folder), max_length=TINY_MAX_LENGTH).model.state_dict()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_stages_run_in_order_and_leave_checkpoints_with_a_record_of_all_before(
    finished: Path, small_recipe: Recipe
) -> None:
    assert STAGES == ("warmup", "bridge", "contrastive")
    assert {path.name for path in finished.iterdir()} == {RUN_MARKER, RUN_FILE, *STAGES}
    logs = {stage: entry["log"] for stage, entry in read_run(finished)["stages"].items()}
    for number, stage in enumerate(STAGES, start=1):
        training = read_training(finished / stage)
        assert Recipe.parse(training["recipe"]) == small_recipe
        assert [(entry["stage"], entry["steps"]) for entry in training["stages"]] == [
            (each, 2) for each in STAGES[:number]
        ]
        assert training["stages"][-1]["final"]["loss"] == pytest.approx(logs[stage][-2]["loss"], rel=1e-3)


def test_each_stage_logs_its_metrics(finished: Path) -> None:
    geometry = {"alignment", "uniformity", "modality_gap", "effective_rank"}
    accuracies = {"accuracy_matching_image", "accuracy_shuffled_image", "accuracy_no_image"}
    parts = {
        "warmup": {"loss", "mntp_loss", "mae_loss", "masked_token_accuracy"},
        "bridge": {"loss", "masked_token_accuracy", *accuracies, *geometry},
        "contrastive": {"loss", *geometry},
    }
    for stage, names in parts.items():
        lines = [line for line in read_run(finished)["stages"][stage]["log"] if "loss" in line]
        assert [line["step"] for line in lines] == [1, 2]
        assert names <= lines[-1].keys()
        assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_checkpoint_reloads_bidirectional_in_the_stock_class(finished: Path, stage: str, implementation: str) -> None:
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        finished / stage, attn_implementation=implementation, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"], "the pixel decoder is thrown away"
    assert_bidirectional(model)


def test_the_last_stage_exports(finished: Path, tmp_path: Path) -> None:
    out = export_model(finished / "contrastive", tmp_path / "cocoa-qwen2vl")
    model = SentenceTransformer(str(out), device="cpu")
    assert model.prompts["query"] == "find: "
    assert model.encode([{"text": "a red ring"}]).shape == (1, 32)
    assert equal(weights(out), weights(finished / "contrastive"))


def test_a_seed_gives_the_same_weights_again_and_another_gives_others(
    finished: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    torch.rand(7)  # earlier draws do not matter
    run(small_recipe.model_copy(update={"contrastive": None}), tmp_path / "again")
    for stage in ("warmup", "bridge"):  # test_resume.py compares the third
        assert equal(weights(finished / stage), weights(tmp_path / "again" / stage))
    other = small_recipe.model_copy(update={"seed": 1, "bridge": None, "contrastive": None})
    run(other, tmp_path / "other")
    assert not equal(weights(finished / "warmup"), weights(tmp_path / "other" / "warmup"))


def test_checkpointed_gradients_are_the_same(finished: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    seen: dict[str, Trainer] = {}

    def inspect(stage: str, trainer: Trainer) -> None:
        assert backbone_of(trainer).is_gradient_checkpointing
        assert hasattr(trainer.model, "pixel_decoder") is (stage == "warmup")
        seen[stage] = trainer

    run(small_recipe.model_copy(update={"gradient_checkpointing": True}), tmp_path / "out", inspect=inspect)
    assert [trainer.state.global_step for trainer in seen.values()] == [2, 2, 2]
    for stage in STAGES:
        kept, recomputed = weights(finished / stage), weights(tmp_path / "out" / stage)
        assert all(torch.allclose(kept[name], recomputed[name], atol=1e-6) for name in kept)


def backbone_of(trainer: Trainer) -> Any:  # noqa: ANN401
    model: Any = trainer.model
    return model[0].auto_model if isinstance(model, SentenceTransformer) else model.backbone


def test_each_stage_starts_from_the_weights_of_the_one_before_in_the_recipes_attention(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    attention = {}

    def inspect(stage: str, trainer: Trainer) -> None:
        attention[stage] = backbone_of(trainer).config._attn_implementation

    stages = {"warmup": STAGE, "bridge": FROZEN, "contrastive": FROZEN}
    given = recipe(tiny_backbone_path, scene_folder, attn_implementation="eager", **stages)
    results = run(given, tmp_path / "out", inspect=inspect)
    assert attention == dict.fromkeys(STAGES, "eager")
    start, warmup, bridge, contrastive = map(weights, (tiny_backbone_path, *(result.folder for result in results)))
    assert not equal(start, warmup), "the first stage trains"
    assert equal(warmup, bridge)
    assert equal(bridge, contrastive)


def test_bf16_trains_and_logs_to_tensorboard_over_an_earlier_run(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    options = {"mixed_precision": "bf16", "report_to": ["tensorboard"]}
    out = earlier_run(tmp_path / "out")
    results = run(recipe(tiny_backbone_path, scene_folder, **options, **dict.fromkeys(STAGES, STAGE)), out)
    assert not (out / "warmup" / "stale.txt").exists()
    for result in results:
        assert all(value.dtype == torch.float32 for value in weights(result.folder).values())
        assert result.final["loss"] > 0
        events = EventAccumulator(str(out / "tensorboard" / result.stage)).Reload()
        assert {"train/grad_norm", "train/tokens_per_second", "train/mfu"} <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


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
    listed = ", ".join(f"{key} {json.dumps(value)}" for key, value in inherited.items())
    assert f"inherited from {start}: {listed}\n" in caplog.text
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


# Wrong input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no stage; give at least one of warmup, bridge, contrastive"),
        ({"bridge": STAGE}, r"stage bridge, data: no data; give one of data\.folder, data\.file"),
        (
            {"report_to": ["trackio"], "warmup": {**STAGE, "data": {"folder": "."}}},
            "trackio, which is not installed; run: pip install trackio",
        ),
    ],
)
def test_an_impossible_recipe_is_refused_before_anything_is_written(
    tiny_backbone_path: Path, tmp_path: Path, values: Values, message: str
) -> None:
    assert find_spec("trackio") is None
    with pytest.raises(UsageError, match=message):
        run(recipe(tiny_backbone_path, None, **values), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "text"), [("thesis.txt", "mine"), (RUN_FILE, '{"flour": "500 g"}')])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CocoaError, match="holds something else"):
        run(recipe(tiny_backbone_path, scene_folder, warmup=STAGE), tmp_path)
    assert contents(tmp_path) == {name: text.encode()}


def earlier_run(out: Path) -> Path:
    (out / "warmup").mkdir(parents=True)
    (out / RUN_MARKER).write_text("{}")
    (out / "warmup" / "stale.txt").write_text("of the earlier run")
    return out


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
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, values: Values, message: str
) -> None:
    """Hours of training must not be lost to a misspelt name."""

    def without_bf16(**arguments: Any) -> TrainingArguments:
        if arguments["bf16"]:
            raise ValueError("no bf16 here")
        return TrainingArguments(**arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "TrainingArguments", without_bf16)
    (tmp_path / "empty").mkdir()
    out = earlier_run(tmp_path / "out")
    before = contents(out)
    given = {"backbone": backbone, "max_length": TINY_MAX_LENGTH, "data": {"folder": str(scene_folder)}, **values}
    with pytest.raises(CocoaError, match=message):
        run(Recipe.parse({"name": "test", "warmup": STAGE, **given}), out)
    assert contents(out) == before


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


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_the_stage_at_its_step(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, stage: str
) -> None:
    diverging = {**STAGE, "steps": 6, "learning_rate": 1e30, "logging_steps": 6}
    with pytest.raises(CocoaError, match=r"loss of step [2-6] is (nan|inf); lower learning_rate \(1e\+30\)"):
        run(recipe(tiny_backbone_path, scene_folder, **{stage: diverging}), tmp_path / "out")
    assert not (tmp_path / "out" / stage / TRAINING_FILE).exists()
