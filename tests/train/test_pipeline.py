import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import PROMPTS, contents
from run_records import ACCURACIES, GEOMETRY
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbones import COCOA, TINY_MAX_LENGTH, MakeRecipe
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments

from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.folders import RUN_MARKER
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import load_backbone, read_processor
from cocoa_embed.model.export import export_model
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.model.training_record import RUN_FILE, TRAINING_FILE, read_run, read_training
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.plan import checks
from cocoa_embed.train.recipe import Recipe

Values = dict[str, Any]

STAGE: Values = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1}
FROZEN: Values = {**STAGE, "steps": 1, "warmup_steps": 1}
"""One step at the warm-up's first learning rate, which is 0: the stage ends with the weights it began with."""


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe) -> MakeRecipe:
    return partial(tiny_recipe, prompts=PROMPTS)


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_backbone(str(folder), max_length=TINY_MAX_LENGTH).model.state_dict()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


METRICS = {
    "warmup": {"loss", "mntp_loss", "mae_loss", "masked_token_accuracy"},
    "bridge": {"loss", "masked_token_accuracy", *ACCURACIES, *GEOMETRY},
    "contrastive": {"loss", *GEOMETRY},
}


def test_the_stages_run_in_order_and_leave_checkpoints_with_logs_and_a_record_of_all_before(
    finished: Path, small_recipe: Recipe
) -> None:
    assert tuple(METRICS) == COCOA
    assert {path.name for path in finished.iterdir()} == {RUN_MARKER, RUN_FILE, *COCOA}
    for number, stage in enumerate(COCOA, start=1):
        training = read_training(finished / stage)
        assert Recipe.parse(training["recipe"]) == small_recipe
        assert [(entry["stage"], entry["steps"]) for entry in training["stages"]] == [
            (each, 2) for each in COCOA[:number]
        ]
        log = [line for line in read_run(finished)["stages"][stage]["log"] if "loss" in line]
        assert [line["step"] for line in log] == [1, 2]
        assert METRICS[stage] <= log[-1].keys()
        assert all(math.isfinite(line["loss"]) for line in log)
        assert training["stages"][-1]["final"]["loss"] == pytest.approx(log[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize("stage", COCOA)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_checkpoint_reloads_bidirectional_in_the_stock_class(finished: Path, stage: str, implementation: str) -> None:
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        finished / stage, attn_implementation=implementation, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"], "the pixel decoder is thrown away"
    assert_bidirectional(model)


def test_the_last_stage_exports_with_its_prompts_and_weights(finished: Path, tmp_path: Path) -> None:
    out = export_model(finished / "contrastive", tmp_path / "cocoa-qwen2vl")
    assert SentenceTransformer(str(out), device="cpu").prompts["query"] == "find: "
    assert equal(weights(out), weights(finished / "contrastive"))


def test_another_seed_gives_other_weights(finished: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    """And the same seed the same: test_resume.py compares a whole run with one in two parts."""
    run(small_recipe.model_copy(update={"seed": 1, "bridge": None, "contrastive": None}), tmp_path / "other")
    assert not equal(weights(finished / "warmup"), weights(tmp_path / "other" / "warmup"))


@pytest.mark.slow
def test_checkpointed_gradients_are_the_same(finished: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    def inspect(stage: str, trainer: Trainer) -> None:
        assert trainer.state.global_step == 2
        assert backbone_of(trainer).is_gradient_checkpointing
        assert hasattr(trainer.model, "pixel_decoder") is (stage == "warmup")

    run(small_recipe.model_copy(update={"gradient_checkpointing": True}), tmp_path / "out", inspect=inspect)
    for stage in COCOA:
        kept, recomputed = weights(finished / stage), weights(tmp_path / "out" / stage)
        assert all(torch.allclose(kept[name], recomputed[name], atol=1e-6) for name in kept)


def backbone_of(trainer: Trainer) -> Any:  # noqa: ANN401
    model: Any = trainer.model
    return model[0].auto_model if isinstance(model, SentenceTransformer) else model.backbone


def test_each_stage_starts_from_the_weights_of_the_one_before_in_the_recipes_attention(
    recipe: MakeRecipe, tiny_backbone_path: Path, tmp_path: Path
) -> None:
    attention = {}

    def inspect(stage: str, trainer: Trainer) -> None:
        attention[stage] = backbone_of(trainer).config._attn_implementation

    stages = {"warmup": STAGE, "bridge": FROZEN, "contrastive": FROZEN}
    results = run(recipe(attn_implementation="eager", **stages), tmp_path / "out", inspect=inspect)
    assert attention == dict.fromkeys(COCOA, "eager")
    start, warmup, bridge, contrastive = map(weights, (tiny_backbone_path, *(result.folder for result in results)))
    assert not equal(start, warmup), "the first stage trains"
    assert equal(warmup, bridge)
    assert equal(bridge, contrastive)


def test_bf16_trains_and_logs_to_tensorboard_over_an_earlier_run(recipe: MakeRecipe, tmp_path: Path) -> None:
    options = {"mixed_precision": "bf16", "report_to": ["tensorboard"]}
    out = earlier_run(tmp_path / "out")
    results = run(recipe(**options, **dict.fromkeys(COCOA, STAGE)), out)
    assert not (out / "warmup" / "stale.txt").exists()
    for result in results:
        assert all(value.dtype == torch.float32 for value in weights(result.folder).values())
        assert result.final["loss"] > 0
        events = EventAccumulator(str(out / "tensorboard" / result.stage)).Reload()
        assert {"train/grad_norm", "train/tokens_per_second", "train/mfu"} <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_a_run_from_a_checkpoint_inherits_its_settings(
    recipe: MakeRecipe, scene_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {"max_pixels": 1568, "bidirectional": False}
    run(recipe(**kept, warmup=FROZEN), tmp_path / "first")
    assert "inherited" not in caplog.text
    start = tmp_path / "first" / "warmup"
    second = Recipe.parse({"name": "second", "backbone": str(start), "data": {"folder": str(scene_folder)},
                           "max_pixels": 3136, "contrastive": STAGE})  # fmt: skip
    (result,) = run(second, tmp_path / "second")
    inherited = {"prompts": PROMPTS, "max_length": TINY_MAX_LENGTH, "bidirectional": False}
    listed = ", ".join(f"{key} {json.dumps(value)}" for key, value in inherited.items())
    assert f"inherited from {start}: {listed}\n" in caplog.text
    training = read_training(result.folder)
    assert {key: training["recipe"][key] for key in inherited} == inherited
    assert training["recipe"]["max_pixels"] == 3136, "what the recipe gives itself stays"
    processor = load_backbone(str(result.folder)).processor
    assert processor.image_processor.size["longest_edge"] == 3136
    assert processor.tokenizer.model_max_length == TINY_MAX_LENGTH
    assert SentenceTransformer(str(result.folder), device="cpu").prompts == PROMPTS


@pytest.mark.parametrize(
    ("family", "sides"), [("qwen2_vl", (28, 84, 56)), ("internvl", (16, 48, 32))], indirect=["family"]
)
def test_a_stage_scales_images_to_its_own_limit_and_the_next_one_is_free_of_it(
    recipe: MakeRecipe, tmp_path: Path, sides: tuple[int, int, int]
) -> None:
    small, large, middle = (side**2 for side in sides)
    stages = {
        "warmup": {**FROZEN, "max_pixels": small},
        "bridge": FROZEN,
        "contrastive": {**FROZEN, "max_pixels": middle},
    }
    results = run(recipe(max_pixels=large, **stages), tmp_path / "out")
    limits = []
    for result in results:
        processor = read_processor(str(result.folder))
        limits.append(family_of_images(processor).most_pixels(processor))
    assert limits == [small, large, middle]
    exported = load_encoder(export_model(results[-1].folder, tmp_path / "model"), "cpu")
    assert family_of_images(exported.model.processor).most_pixels(exported.model.processor) == middle
    later = recipe(backbone=str(results[-1].folder), warmup=FROZEN)
    assert checks.examine(later, tmp_path / "later").recipe.max_pixels == middle, "that of the stage it starts from"


def test_a_stages_limit_that_fits_no_sequence_is_refused(recipe: MakeRecipe) -> None:
    given = recipe(max_pixels=784, contrastive={**STAGE, "max_pixels": 200 * 784})
    with pytest.raises(UsageError, match=r"An image of up to 156800 pixels takes 200 visual tokens.*lower max_pixels"):
        checks.examine(given, Path("out"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", COCOA)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_trained_and_merged(
    recipe: MakeRecipe, tiny_backbone_path: Path, tmp_path: Path, stage: str, kind: str
) -> None:
    adapted = {**STAGE, "adapter": {"kind": kind, "r": 2, "alpha": 4}, "freeze_vision": True}
    run(recipe(**{stage: adapted}), tmp_path / "out")
    before, after = weights(tiny_backbone_path), weights(tmp_path / "out" / stage)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers." in name and "visual" not in name for name in changed)


# Wrong input


def earlier_run(out: Path) -> Path:
    (out / "warmup").mkdir(parents=True)
    (out / RUN_MARKER).write_text("{}")
    (out / "warmup" / "stale.txt").write_text("of the earlier run")
    return out


@pytest.mark.parametrize(
    ("values", "message"),
    [({"backbone": "empty"}, "empty"), ({"mixed_precision": "bf16"}, "stage warmup: no bf16 here")],
)
def test_a_run_that_cannot_start_leaves_the_earlier_run_as_it_is(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: Values, message: str
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
    with pytest.raises(CocoaError, match=message):
        run(recipe(**{"backbone": "scene-captioner", "warmup": STAGE, **values}), out)
    assert contents(out) == before


@pytest.mark.parametrize("held", ["backbone", "data", "thesis.txt", RUN_FILE])
def test_an_output_folder_that_holds_something_else_or_what_the_run_reads_is_refused(
    recipe: MakeRecipe, tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, held: str
) -> None:
    """To go on from an earlier run's stage, into that run's folder, would delete what it starts from."""
    out, read = tmp_path / "out", {"backbone": tiny_backbone_path, "data": scene_folder}
    if held in read:
        read[held] = Path(shutil.copytree(read[held], earlier_run(out) / held))
    else:
        out.mkdir()
        (out / held).write_text('{"flour": "500 g"}')
    before = contents(out)
    with pytest.raises(CocoaError, match="which the run reads" if held in read else "holds something else"):
        run(recipe(backbone=str(read["backbone"]), data={"folder": str(read["data"])}, contrastive=STAGE), out)
    assert contents(out) == before


@pytest.mark.parametrize("stage", COCOA)
def test_a_loss_that_is_not_finite_stops_the_stage_at_its_step(recipe: MakeRecipe, tmp_path: Path, stage: str) -> None:
    diverging = {**STAGE, "steps": 6, "learning_rate": 1e30, "logging_steps": 6}
    with pytest.raises(CocoaError, match=r"loss of step [2-6] is (nan|inf); lower learning_rate \(1e\+30\)"):
        run(recipe(**{stage: diverging}), tmp_path / "out")
    assert not (tmp_path / "out" / stage / TRAINING_FILE).exists()
