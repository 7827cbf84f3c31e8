"""The plan of a dry run agrees with the run, and fails where the run would."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from exported import contents
from interrupted import killed_at
from table_files import png, write_images, write_table
from tiny_backbones import COCOA, SCENES, TINY_MAX_LENGTH, MakeRecipe, special_ids
from transformers import AutoProcessor, Qwen2VLConfig

from cocoa_embed.cli import main as cli
from cocoa_embed.cli.train import subset_words
from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.backbone import Backbone, fitting_max_pixels, load_processor, prepare_processor
from cocoa_embed.model.training_record import read_run
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.data import mixture
from cocoa_embed.train.data.mixture import ReadRows
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.plan.cards import CARDS
from cocoa_embed.train.plan.checks import examine, prepare
from cocoa_embed.train.plan.dry_run import SAMPLE, plan, sample_rows
from cocoa_embed.train.plan.meter import Parameters
from cocoa_embed.train.plan.stage_rows import read_stages
from cocoa_embed.train.timing import seconds_per_step

STAGE: dict[str, Any] = {"steps": 2, "batch_size": 4, "warmup_steps": 0, "logging_steps": 1}


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe, scene_folder: Path) -> MakeRecipe:
    bridge = {"epochs": 0.5, "batch_size": 8, "mini_batch_size": 4, "probe_rows": 0}
    contrastive = {**STAGE, "mini_batch_tokens": 60, "data": {"folder": str(scene_folder), "limit": 10}}
    return partial(tiny_recipe, warmup=STAGE, bridge=bridge, contrastive=contrastive)


def test_the_run_matches_its_plan(
    small_recipe: Recipe, finished: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    planned = plan(small_recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "a plan writes nothing"
    counted = Parameters.of(tiny_backbone.model).total
    recorded = read_run(finished)["stages"]
    assert [stage.stage for stage in planned.stages] == list(recorded)
    for stage in planned.stages:
        assert stage.folder == str(tmp_path / "out" / stage.stage)
        assert stage.steps == recorded[stage.stage]["step"]
        assert stage.rows == recorded[stage.stage]["rows"]
        assert stage.trainable_parameters == recorded[stage.stage]["trained_parameters"]
        assert stage.parameters >= counted
    assert [stage.parameters == counted for stage in planned.stages] == [False, True, True], "the pixel decoder"
    assert [stage.rows_at_once for stage in planned.stages] == [2, 2, 4], "no more than a batch has"


def test_tokens_and_flops_are_those_of_the_batches(recipe: MakeRecipe, tmp_path: Path) -> None:
    """With one batch of all rows a step, the sample is the data."""
    whole = {"steps": 1, "batch_size": SCENES, "warmup_steps": 0, "logging_steps": 1}
    given = recipe(bridge=None, contrastive=None, warmup=whole)
    (stage,) = plan(given, tmp_path / "out").stages
    seen: list[Any] = []
    run(given, tmp_path / "out", inspect=lambda name, trainer: seen.extend(trainer.get_train_dataloader()))
    (batch,) = seen
    assert stage.tokens_per_step == pytest.approx(batch["facts"].tokens)
    assert stage.flops == pytest.approx(batch["facts"].flops)


def test_the_sample_has_rows_with_and_without_an_image_in_their_ratio(scene_rows: list[Row]) -> None:
    """Each image has six rows, one of them with the image, so that every n-th row could be the same one of each."""
    text_row = Row(query=Item(text="a caption of some words"), positive=Item(text="another one"), source="a row")
    rows = RowTable.of(row for _ in range(SAMPLE) for row in (scene_rows[0], *[text_row] * 5))
    sample = sample_rows(rows, seed=0)
    assert len(sample) == SAMPLE
    with_image = sum(row.image is not None for row in sample)
    assert with_image == pytest.approx(SAMPLE / 6, abs=3 * (SAMPLE * 5 / 36) ** 0.5), "within three standard deviations"


def test_a_plan_needs_no_weights(recipe: MakeRecipe, tiny_backbone_path: Path, tmp_path: Path) -> None:
    """So a backbone of billions of parameters can be planned on any machine."""
    processor = load_processor(str(tiny_backbone_path))
    processor.save_pretrained(tmp_path / "large")
    ids, width = special_ids(processor.tokenizer), Qwen2VLConfig().get_text_config().hidden_size
    Qwen2VLConfig(**ids, vision_config={"hidden_size": width}).save_pretrained(tmp_path / "large")
    adapter = {"kind": "lora", "r": 8}
    given = recipe(backbone=str(tmp_path / "large"), warmup={**STAGE, "adapter": adapter}, bridge=STAGE)
    adapted, whole, _ = plan(given, tmp_path / "out").stages
    assert 7.2e10 < whole.parameters < 7.4e10
    assert whole.trainable_parameters == whole.parameters
    assert adapted.trainable_parameters < 0.05 * adapted.parameters, "adapters, and the pixel decoder"
    sixteen_bytes_each = 16 * whole.parameters
    assert sixteen_bytes_each < whole.memory_bytes["total"] < 1.2 * sixteen_bytes_each
    assert adapted.memory_bytes["total"] < whole.memory_bytes["total"] / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"folder": "nowhere"}}, "data.folder nowhere does not exist"),
        ({"data": None}, "stage warmup, data: no data; give one of data.folder, data.file"),
        ({"backbone": "no-such-backbone"}, "no-such-backbone"),
        ({"report_to": ["trackio"]}, "trackio, which is not installed; run: pip install trackio"),
        ({"max_length": 16}, "max_length is 16, too short for an image with"),
        ({"warmup": {**STAGE, "batch_size": 6, "mini_batch_size": 4}}, "not a multiple of 4"),
        ({"attn_implementation": "flex_attention"}, "on 'cpu'; use sdpa"),
        ({"contrastive": {**STAGE, "matryoshka_dims": [16, 4096]}}, "4096"),
        ({"sharding": "fsdp2", "contrastive": None}, "needs several accelerators"),
        ({"warmup": None, "bridge": None, "contrastive": None}, "has no stage; give at least one of warmup, "),
    ],
)
def test_a_plan_fails_where_the_run_would(
    recipe: MakeRecipe, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given = recipe(**change)
    for act in (plan, run):
        with pytest.raises(CocoaError) as raised:
            act(given, tmp_path / "out")
        assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_rows_to_leave_out_are_planned_and_listed_with_their_stages(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "BAD_ROW_LIMIT", 0.5)
    write_images(tmp_path / "images", "abcd")
    (tmp_path / "images" / "c.png").write_bytes(b"no image")
    lines = [{"file_name": f"{name}.png", "text": f"picture {name}"} for name in "abcd"]
    write_table(tmp_path / "images" / "metadata.jsonl", lines)
    given = recipe(data={"folder": str(tmp_path / "images"), "on_bad_row": "skip"}, contrastive=None)
    planned = plan(given, tmp_path / "out")
    assert [stage.rows for stage in planned.stages] == [{"data": 3}] * 2
    prepared = prepare(given, tmp_path / "out", resume=False)
    assert {stage: len(read.rows) for stage, read in prepared.rows.items()} == {"warmup": 3, "bridge": 3}
    (bad,) = map(json.loads, (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines())
    assert [bad] == json.loads(json.dumps(planned.bad_rows))
    assert (bad["source"].split(", ")[-1], bad["stages"]) == ("c.png", ["warmup", "bridge"])


def test_a_backbone_without_a_fitting_pixel_limit_gets_one_and_the_plan_says_so(
    recipe: MakeRecipe, tiny_backbone_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = Path(shutil.copytree(tiny_backbone_path, tmp_path / "stock"))
    processor = AutoProcessor.from_pretrained(backbone)
    processor.image_processor.size["longest_edge"] = 12_845_056
    processor.save_pretrained(backbone)
    prepared = examine(recipe(backbone=str(backbone)), tmp_path / "out")
    assert prepared.recipe.max_pixels == TINY_MAX_LENGTH // 2 * 28**2
    assert f"down to {prepared.recipe.max_pixels} pixels, so that they fit into max_length 128" in caplog.text
    with pytest.raises(UsageError, match="lower max_pixels"):
        examine(recipe(backbone=str(backbone), max_pixels=10**6), tmp_path / "out")


@pytest.mark.parametrize(("max_length", "eos_tokens"), [(24, 1), (32, 1), (32, 4), (48, 1), (64, 4)])
def test_an_image_limit_that_is_chosen_is_one_that_is_accepted(max_length: int, eos_tokens: int) -> None:
    limit = fitting_max_pixels("scene-captioner", max_length, eos_tokens)
    assert limit is not None
    processor = load_processor("scene-captioner")
    prepare_processor(processor, max_length=max_length, max_pixels=limit, vectors=eos_tokens)


def test_a_sequence_too_short_for_any_image_says_so() -> None:
    with pytest.raises(UsageError, match="max_length is 20, too short for an image"):
        fitting_max_pixels("scene-captioner", 20)


def test_a_finished_run_has_nothing_to_plan_and_a_changed_recipe_is_refused(
    small_recipe: Recipe, finished: Path
) -> None:
    before = contents(finished)
    planned = plan(small_recipe, finished, resume=True)
    assert (planned.stages, planned.finished) == ([], list(COCOA))
    with pytest.raises(UsageError, match="max_length"):
        plan(small_recipe.model_copy(update={"max_length": 200}), finished, resume=True)
    assert contents(finished) == before


@pytest.fixture
def captions_and_pairs(tmp_path: Path) -> dict[str, Any]:
    """Five images with two captions each, and a table in which one of three rows has no text."""
    write_images(tmp_path, "abcde")
    lines = [{"file_name": f"{n}.png", "text": n, "captions": [f"an {n}", f"one {n}"]} for n in "abcde"]
    write_table(tmp_path / "metadata.jsonl", lines)
    pairs = [{"query_image": "a.png", "positive_text": "a"}, {"query_text": "b", "positive_text": "c"}]
    pairs.append({"query_image": "b.png", "positive_image": "c.png"})
    file = write_table(tmp_path / "pairs.jsonl", pairs)
    folder = {"folder": str(tmp_path), "captions": "captions", "paraphrases": 1, "weight": 2}
    return {"subsets": {"photos": folder, "pairs": {"file": str(file), "limit": 9}}}


def test_a_plan_says_where_rows_come_from_and_which_the_bridge_leaves_out(
    recipe: MakeRecipe, captions_and_pairs: dict[str, Any], tmp_path: Path
) -> None:
    warmup, bridge = plan(recipe(data=captions_and_pairs, contrastive=None), tmp_path / "out").stages
    assert warmup.rows == {"photos": 30, "pairs": 3}
    assert (bridge.rows, bridge.needs.split("; ")[-1]) == ({"photos": 30, "pairs": 2}, "caption their images")
    assert [subset.left_out for subset in bridge.subsets.values()] == [0, 1]
    assert [subset_words(subset) for subset in warmup.subsets.values()] == [
        "30 (5 images; 2 captions + 1 paraphrases = 3 rows an image; each drawn 2 times)",
        "3 (2 with an image, 1 of text alone; limit 9)",
    ]
    assert warmup.epochs == pytest.approx(2 * 4 / 33)
    assert not any(subset.left_out for subset in warmup.subsets.values())


def test_max_rows_draws_from_all_subsets_by_the_seed_after_unusable_rows_are_left_out(
    recipe: MakeRecipe, captions_and_pairs: dict[str, Any]
) -> None:
    def rows(max_rows: int, seed: int = 0) -> ReadRows:
        read = recipe(data=captions_and_pairs, seed=seed, bridge={**STAGE, "data": {"max_rows": max_rows}})
        return read_stages(read, ["bridge"])["bridge"]

    whole, some = rows(32), rows(20)
    assert (whole.rows.counts, whole.left_out) == ({"photos": 30, "pairs": 2}, {"photos": 0, "pairs": 1})
    assert len(some.rows) == sum(some.rows.counts.values()) == 20
    assert some.left_out == whole.left_out
    assert some.rows.fingerprint == rows(20).rows.fingerprint != rows(20, seed=1).rows.fingerprint
    sources = [row.subset for row in some.rows]
    assert sources == sorted(sources, reverse=True), "in the order of the subsets"


def test_images_that_only_decoding_finds_broken_stop_a_plan_or_are_left_out_of_its_sample(
    recipe: MakeRecipe, captions_and_pairs: dict[str, Any], tmp_path: Path
) -> None:
    image = tmp_path / "e.png"
    image.write_bytes(image.read_bytes().replace(b"IDAT", b"IDAT" + bytes(8)))
    with pytest.raises(CocoaError, match=r"e\.png: .*data\.on_bad_row=skip"):
        plan(recipe(data=captions_and_pairs, bridge=None, contrastive=None), tmp_path / "out")
    skipping = {**captions_and_pairs, "on_bad_row": "skip"}
    (planned,) = plan(recipe(data=skipping, bridge=None, contrastive=None), tmp_path / "out").stages
    assert planned.rows == {"photos": 30, "pairs": 3}


def test_a_bridge_without_any_text_is_refused(recipe: MakeRecipe, tmp_path: Path) -> None:
    write_images(tmp_path, "ab")
    pairs = write_table(tmp_path / "pairs.jsonl", [{"query_image": "a.png", "positive_image": "b.png"}])
    with pytest.raises(UsageError, match=r"bridge can use none of its 1 rows: .*; caption their images"):
        plan(recipe(warmup=None, bridge={**STAGE, "data": {"folder": None, "file": str(pairs)}}), tmp_path / "out")


@pytest.mark.parametrize(
    ("stage", "side", "weight", "is_refused"),
    [
        ("warmup", 224, 0, True),
        ("bridge", 224, 0, True),
        ("contrastive", 224, 1, True),
        ("contrastive", 224, 0, False),
        ("warmup", 196, 0, False),
    ],
)
def test_images_that_do_not_fit_into_a_sequence_together_are_refused(
    recipe: MakeRecipe, tmp_path: Path, stage: str, side: int, weight: float, is_refused: bool
) -> None:
    """Two images of 224 x 224 pixels have 128 visual tokens, of 196 x 196 pixels 98."""
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(0, (side, side)))
    pair = {"query_image": "a.png", "positive_image": "b.png"}
    rows = [{**pair, "query_text": f"query {n}", "positive_text": f"text {n}"} for n in range(4)]
    values: dict[str, Any] = dict.fromkeys(COCOA) | {stage: STAGE | {"steps": 2, "batch_size": 2}}
    if weight:
        values[stage]["reconstruction_weight"] = weight
    given = recipe(data={"file": str(write_table(tmp_path / "pairs.jsonl", rows))}, max_pixels=224 * 224,
                   **values)  # fmt: skip
    if is_refused:
        message = r"2 images of .*pairs\.jsonl:1 take 133 tokens together in stage .*, more than max_length 128; lower"
        with pytest.raises(UsageError, match=message):
            examine(given, tmp_path / "out")
    else:
        assert examine(given, tmp_path / "out").rows


def test_an_interrupted_run_is_planned_from_its_newest_checkpoint(recipe: MakeRecipe, tmp_path: Path) -> None:
    given, out = recipe(bridge=None, contrastive=None, warmup={**STAGE, "steps": 4, "save_steps": 3}), tmp_path / "out"
    with killed_at(4):
        run(given, out)
    whole, rest = plan(given, out), plan(given, out, resume=True)
    assert [(each.stages[0].steps, each.stages[0].steps_done) for each in (whole, rest)] == [(4, 0), (4, 3)]
    assert rest.stages[0].flops == pytest.approx(whole.stages[0].flops / 4)


@pytest.mark.slow
def test_timing_steps_leaves_nothing_behind(recipe: MakeRecipe, tmp_path: Path) -> None:
    given = recipe(warmup=None, bridge={**STAGE, "probe_rows": 4, "probe_steps": 1})
    planned = plan(given, tmp_path / "out", card="h100", seconds_per_step=seconds_per_step)
    for stage in planned.stages:
        assert stage.seconds_per_step is not None
        assert stage.seconds == pytest.approx(2 * stage.seconds_per_step) != 0
        assert stage.card_seconds is not None
        assert stage.card_seconds > stage.flops / CARDS["h100"].full
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_plan(recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "planned.yaml").write_text(recipe().model_dump_json())
    arguments = ["train", str(tmp_path / "planned.yaml"), "--dry-run", "warmup.steps=3", "--card", "h100", "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [(stage["stage"], stage["steps"]) for stage in document["stages"]] == [*zip(COCOA, (3, 2, 2), strict=True)]
    for stage in document["stages"]:
        assert stage["memory_bytes"]["total"] == sum(v for name, v in stage["memory_bytes"].items() if name != "total")
        assert f"writes {stage['folder']}" in printed.err
    assert "all stages: about 0 s on one h100" in printed.err
    assert all(f"warning: {warning}" in printed.err for warning in document["warnings"])
    assert "too few for the 500 steps" in document["warnings"][0]
    assert not (tmp_path / "out").exists()
    for options, message in (
        (["--dry-run", "--card", "h10"], "--card 'h10' is unknown (did you mean 'h100'?"),
        (["--card", "h100"], "give --dry-run, too"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments[:2], *options])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
