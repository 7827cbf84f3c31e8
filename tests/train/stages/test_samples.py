"""What a stage leaves to be looked at: of which rows, and at no cost to its training."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from cocoa_embed.errors import CocoaError
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.report.figures import data_uri
from cocoa_embed.train import Recipe, pipeline, run
from cocoa_embed.train.data.rows import Item, Row, read_image_folder
from cocoa_embed.train.loop.batch_facts import DescribedBatches
from cocoa_embed.train.loop.stage_trainer import row_numbers
from cocoa_embed.train.stages import samples
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.probe import hold_out_rows
from cocoa_embed.train.stages.samples import (
    SAMPLE_ROWS,
    SAMPLES_FILE,
    Samples,
    choose_rows,
    read_samples,
    write_samples,
)
from cocoa_embed.train.stages.warmup.settings import WarmupSettings
from conftest import STAGE, TINY_MAX_LENGTH

BRIDGE = {**STAGE, "probe_rows": 10, "probe_steps": 1}
ADAPTER = {"kind": "dora", "r": 2, "alpha": 4}


def recipe(backbone: Path, folder: Path, **stages: Any) -> Recipe:
    return Recipe.parse(
        {
            "name": "test",
            "backbone": str(backbone),
            "max_length": TINY_MAX_LENGTH,
            "data": {"folder": str(folder)},
            **stages,
        }
    )


def test_both_stages_leave_samples_of_the_rows_that_the_bridge_keeps_out(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    stages = {"warmup": {**STAGE, "adapter": ADAPTER}, "bridge": {**BRIDGE, "adapter": ADAPTER}}
    run(recipe(tiny_backbone_path, scene_folder, **stages), tmp_path / "out")
    warmup, bridge = (read_samples(tmp_path / "out" / stage) for stage in ("warmup", "bridge"))
    assert warmup is not None
    assert bridge is not None
    assert (warmup.failure, bridge.failure) == (None, None)
    assert (warmup.kept_out, bridge.kept_out) == (False, True)
    kept_out, _ = hold_out_rows(read_image_folder(scene_folder), 10)
    captions = [row.positive.text for row in kept_out[:SAMPLE_ROWS]]
    assert [picture.caption for picture in warmup.patches] == captions
    for found in (warmup, bridge):
        assert len(found.tokens) == SAMPLE_ROWS
        spelt = ["".join(shown.tokens).replace("Ġ", " ").strip() for shown in found.tokens]
        assert spelt == captions
        assert all(any(shown.hidden) and shown.image is not None for shown in found.tokens)
    assert warmup.mask is None
    assert bridge.mask is not None
    assert set(bridge.mask.blocks) == {"A", "EOS", "B"}


def test_samples_change_no_weight_of_any_stage(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"warmup": STAGE, "bridge": BRIDGE, "contrastive": {"steps": 2, "batch_size": 4, "warmup_steps": 0}}
    given = recipe(tiny_backbone_path, scene_folder, **stages)
    run(given, tmp_path / "with")
    monkeypatch.setattr(pipeline, "leave_samples", lambda *_: None)
    run(given, tmp_path / "without")
    assert (tmp_path / "with" / "bridge" / SAMPLES_FILE).is_file()
    assert not (tmp_path / "without" / "bridge" / SAMPLES_FILE).exists(), "the premise: one run has none"
    assert not (tmp_path / "with" / "contrastive" / SAMPLES_FILE).exists()
    for stage in stages:
        ours, theirs = (load_file(tmp_path / name / stage / "model.safetensors") for name in ("with", "without"))
        assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_samples_that_cannot_be_made_cost_the_run_nothing_and_say_why(
    tiny_backbone_path: Path,
    scene_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory\nis left")

    monkeypatch.setattr(samples, "bridge_reconstructions", fail)
    with caplog.at_level(logging.WARNING, logger="cocoa_embed.train.stages.samples"):
        (result,) = run(recipe(tiny_backbone_path, scene_folder, bridge=BRIDGE), tmp_path / "out")
    assert result.steps == 2
    assert (result.folder / "model.safetensors").is_file()
    found = read_samples(result.folder)
    assert found == Samples(failure="RuntimeError: no memory is left")
    assert "no memory is left" in caplog.text


def trainer_of(backbone: Backbone, devices: int) -> Any:  # noqa: ANN401  it stands for a trainer
    """Stand for a bridge's trainer on so many devices, as far as samples look at one."""
    return SimpleNamespace(
        model=BridgeModel(backbone.model).train(),
        data_collator=DescribedBatches(BridgeCollator(backbone.processor, seed=0), row_numbers, None),
        accelerator=SimpleNamespace(num_processes=devices, unwrap_model=lambda model: model, autocast=nullcontext),
    )


@pytest.mark.parametrize(
    ("devices", "mini_batch_size", "expected"),
    [(1, None, [4, 2]), (2, None, [2, 2, 2]), (4, None, [1] * 6), (1, 2, [2, 2, 2]), (2, 8, [2, 2, 2])],
)
def test_no_more_rows_run_at_once_than_a_device_trains_on(
    tiny_backbone: Backbone, scene_rows: list[Row], devices: int, mini_batch_size: int | None, expected: list[int]
) -> None:
    section = BridgeSettings(steps=1, batch_size=4, mini_batch_size=mini_batch_size)
    parts = samples._collated(trainer_of(tiny_backbone, devices), section, scene_rows[:6])
    assert [len(batch["input_ids"]) for _, batch in parts] == [len(rows) for rows, _ in parts] == expected


def test_a_model_goes_on_training_though_its_samples_fail(
    tiny_backbone: Backbone, scene_rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_backbone, 1)
    batches = samples._collated(trainer, BridgeSettings(steps=1, batch_size=4), scene_rows[:2])
    modes = []

    def fail(batch: object) -> None:
        modes.append(trainer.model.training)
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(trainer.model, "predict", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        samples._made(trainer, batches, True)
    assert modes == [False], "the premise: it failed in another mode"
    assert all(module.training for module in trainer.model.modules())


def test_a_full_disk_takes_the_samples_alone(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, document: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "write_json", full)
    (result,) = run(recipe(tiny_backbone_path, scene_folder, warmup=STAGE), tmp_path / "out")
    assert (result.folder / "model.safetensors").is_file()
    assert read_samples(result.folder) is None


def test_rows_without_images_are_shown_where_there_are_no_others(scene_rows: list[Row]) -> None:
    warmup = WarmupSettings(steps=1, batch_size=4)
    bridge = BridgeSettings(steps=1, batch_size=4, probe_rows=4)
    texts = [Row(Item(text=f"one {number}"), Item(text=f"two {number}"), source="") for number in range(20)]
    assert choose_rows(warmup, texts) == (texts[:SAMPLE_ROWS], False)
    assert choose_rows(warmup, [*texts, *scene_rows]) == (scene_rows[:SAMPLE_ROWS], False)
    assert choose_rows(bridge, [*texts, *scene_rows]) == (scene_rows[:4], True)
    assert choose_rows(bridge, [*texts, *scene_rows[:5]]) == (scene_rows[:5], False), "too few to keep any out"
    twice = [row for row in scene_rows for _ in range(2)]
    assert choose_rows(warmup, twice) == (scene_rows[:SAMPLE_ROWS], False)


def test_what_is_written_is_read_back(tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path) -> None:
    (result,) = run(recipe(tiny_backbone_path, scene_folder, warmup=STAGE), tmp_path / "out")
    first = read_samples(result.folder)
    assert first is not None
    (tmp_path / "again").mkdir()
    write_samples(tmp_path / "again", first)
    again = read_samples(tmp_path / "again")
    assert again is not None
    for one, other in zip(first.patches, again.patches, strict=True):
        assert np.array_equal(np.asarray(one.reconstructed), np.asarray(other.reconstructed))
    assert [each.predicted for each in first.tokens] == [each.predicted for each in again.tokens]


PICTURE = data_uri(Image.new("RGB", (8, 8)))
TOKENS = {"stage": "bridge", "tokens": ["a"], "hidden": [True], "predicted": ["b"], "image": PICTURE}
MASK = {"allowed": ["1"], "labels": ["a"], "blocks": ["EOS"]}
WHOLE: dict[str, Any] = {
    "kept_out": True,
    "failure": None,
    "patches": [{"caption": "a", "original": PICTURE, "masked": PICTURE, "reconstructed": PICTURE}],
    "tokens": [TOKENS],
    "mask": MASK,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept_out": None}, "kept_out is null, a bool is expected"),
        ({"failure": 3}, "failure is 3, a str"),
        ({"patches": None}, "not iterable"),
        ({"patches": [{**WHOLE["patches"][0], "masked": None}]}, "patches[0].masked is null, a str"),
        ({"patches": [{**WHOLE["patches"][0], "masked": "data:image/png;base64,AAAA"}]}, "patches[0].masked: is not"),
        ({"patches": [{**WHOLE["patches"][0], "masked": PICTURE[:70]}]}, "patches[0].masked: "),
        ({"patches": [{**WHOLE["patches"][0], "masked": "data:,?"}]}, "patches[0].masked: "),
        ({"patches": [{**WHOLE["patches"][0], "caption": None}]}, "patches[0].caption is null"),
        ({"tokens": [{**TOKENS, "tokens": None}]}, "tokens[0].tokens is null, a list"),
        ({"tokens": [{**TOKENS, "predicted": [None]}]}, "tokens[0].predicted[0] is null, a str"),
        ({"tokens": [{**TOKENS, "hidden": ["x"]}]}, 'tokens[0].hidden[0] is "x", a bool'),
        ({"tokens": [{**TOKENS, "hidden": []}]}, "needs one entry a token"),
        ({"tokens": [{**TOKENS, "image": "nothing"}]}, "tokens[0].image: "),
        ({"mask": {**MASK, "labels": [None]}}, "mask.labels[0] is null"),
        ({"mask": {**MASK, "allowed": None}}, "mask.allowed is null"),
        ({"mask": {**MASK, "blocks": ["C"]}}, "Unknown blocks"),
    ],
)
def test_each_part_that_is_broken_is_told_with_the_way_out(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / SAMPLES_FILE).write_text(json.dumps(WHOLE))
    assert read_samples(tmp_path) is not None, "the premise: it is whole without the change"
    (tmp_path / SAMPLES_FILE).write_text(json.dumps({**WHOLE, **changes}))
    with pytest.raises(CocoaError) as caught:
        read_samples(tmp_path)
    assert type(caught.value) is CocoaError
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / SAMPLES_FILE} is broken (")
    assert words in message
    assert message.endswith("; remove it to go on without the samples of the stage")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kept_out": true, "failure": null, "patches": [{}]}', '{"mask": 1}']
)
def test_broken_samples_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SAMPLES_FILE).write_text(text)
    with pytest.raises(CocoaError, match=r"samples\.json is broken"):
        read_samples(tmp_path)


def test_a_folder_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    assert read_samples(tmp_path) is None
