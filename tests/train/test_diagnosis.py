import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from exported import PROMPTS
from run_records import GEOMETRY
from safetensors.torch import load_file, save_file
from table_files import write_images, write_table
from tiny_backbones import MakeRecipe

from cocoa_embed.cli import main as cli
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.export import export_model
from cocoa_embed.model.training_record import read_run, write_run
from cocoa_embed.train import StageResult, diagnosis, run
from cocoa_embed.train.data import mixture
from cocoa_embed.train.data.caption_rows import read_image_folder
from cocoa_embed.train.diagnosis import MASKED_TOKENS, Diagnosis, diagnose, held_out_rows

HELD_OUT = 4
STAGE: dict[str, Any] = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}


class Run(NamedTuple):
    out: Path
    results: dict[str, StageResult]


@pytest.fixture(scope="module")
def folder(scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes, the first of which cannot be read, and the third not decoded."""
    folder = Path(shutil.copytree(scene_folder, tmp_path_factory.mktemp("data") / "scenes"))
    images = sorted(folder.glob("*.png"))
    images[0].write_bytes(b"no image")
    images[2].write_bytes(images[2].read_bytes().replace(b"IDAT", b"IDAT" + bytes(8)))
    return folder


@pytest.fixture(scope="module")
def trained(tiny_recipe: MakeRecipe, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run whose bridge has no default settings, so that a diagnosis with defaults would differ."""
    bridge = {"steps": 24, "batch_size": 8, "logging_steps": 24, "probe_rows": HELD_OUT + 1}
    recipe = tiny_recipe(
        prompts=PROMPTS,
        seed=3,
        data={"folder": str(folder), "on_bad_row": "skip"},
        warmup=STAGE,
        bridge={**STAGE, **bridge, "eos_attends_to_b": False, "mask_ratio": 0.4},
        contrastive={**STAGE, "batch_size": 2, "data": {"limit": HELD_OUT - 1}},
    )
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "BAD_ROW_LIMIT", 0.5)
        yield Run(out, {result.stage: result for result in run(recipe, out)})


@pytest.fixture(scope="module")
def of_bridge(trained: Run) -> Diagnosis:
    return diagnose(trained.out / "bridge", device="cpu")


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["diagnose", *map(str, arguments), "--device", "cpu"])
    return int(caught.value.code or 0)


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Path:
    """A copy of the run, for a test that changes it."""
    return Path(shutil.copytree(trained.out, tmp_path / "copied"))


def test_a_bridge_has_the_metrics_of_the_end_of_its_training(trained: Run, of_bridge: Diagnosis, folder: Path) -> None:
    """On the same rows, none of which is broken, with the same tokens masked, and with the recipe's prompts."""
    rows = read_image_folder(folder)
    assert held_out_rows(trained.out / "bridge")[1] == [rows[1], *rows[3 : HELD_OUT + 2]]
    assert (of_bridge.held_out_by, of_bridge.seen_by) == ("bridge", ["warmup"])
    assert of_bridge.masked_tokens is not None
    assert tuple(of_bridge.masked_tokens) == MASKED_TOKENS
    assert tuple(of_bridge.geometry) == GEOMETRY
    last = trained.results["bridge"].final
    assert of_bridge.masked_tokens == pytest.approx({name: last[name] for name in MASKED_TOKENS}, abs=1e-6)
    assert of_bridge.geometry == pytest.approx({name: last[name] for name in GEOMETRY}, rel=1e-4)
    assert all(0 < ratio < 1 for ratio in of_bridge.masked_tokens.values()), "they could differ"


@pytest.mark.parametrize(
    "changes", [{"prompts": {"query": "", "document": ""}}, {"seed": 4}, {"bridge": {"mask_ratio": 0.9}}]
)
def test_prompts_seed_and_settings_are_those_of_the_checkpoint(
    of_bridge: Diagnosis, copied: Path, changes: dict[str, Any]
) -> None:
    record = copied / "bridge" / "cocoa_training.json"
    training = json.loads(record.read_text())
    for key, value in changes.items():
        training["recipe"][key] = {**training["recipe"][key], **value} if isinstance(value, dict) else value
    record.write_text(json.dumps(training))
    changed = diagnose(copied / "bridge", device="cpu")
    assert (changed.geometry == pytest.approx(of_bridge.geometry, rel=1e-4)) is ("prompts" not in changes)
    assert (changed.masked_tokens == of_bridge.masked_tokens) is ("prompts" in changes)


def test_without_a_head_the_geometry_is_measured_alone(
    trained: Run, scene_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = diagnose(trained.out / "contrastive", device="cpu")
    assert found.masked_tokens is None
    assert tuple(found.geometry) == GEOMETRY
    assert command(trained.out / "contrastive") == 0
    assert "not measured: the checkpoint has no language-model head" in capsys.readouterr().err
    exported = export_model(trained.out / "contrastive", tmp_path / "model")
    with pytest.raises(CocoaError, match=r"does not belong to a training run.*give --data FOLDER"):
        diagnose(exported)
    same = (diagnose(each, data=scene_folder, rows=4, device="cpu") for each in (exported, trained.out / "contrastive"))
    assert next(same).geometry == pytest.approx(next(same).geometry, rel=1e-4)


def test_a_folder_replaces_the_held_out_rows(trained: Run, scene_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "ROWS", 5)
    other = diagnose(trained.out / "bridge", data=scene_folder, device="cpu")
    assert (other.rows, other.held_out_by, other.seen_by) == (5, None, [])
    assert other.masked_tokens is not None
    assert diagnose(trained.out / "bridge", rows=2, device="cpu").rows == 2


def test_held_out_rows_that_are_unknown_are_refused(copied: Path, tmp_path: Path) -> None:
    record = read_run(copied)

    def message(**changes: Any) -> str:
        stage = {**record["stages"]["bridge"], **changes.pop("stage", {})}
        write_run(copied, {**record, **changes, "stages": {**record["stages"], "bridge": stage}})
        with pytest.raises(CocoaError) as caught:
            diagnose(copied / "bridge")
        assert str(caught.value).endswith("give --data FOLDER.")
        return str(caught.value)

    assert "No stage of" in message(stage={"held_out": {"rows": [], "seen_by": []}})
    assert "rows of stage bridge have changed since the run" in message(stage={"fingerprint": "other"})
    gone = {**record["recipe"], "data": {"folder": str(tmp_path / "gone")}}
    assert "data of stage bridge" in message(recipe=gone)


@pytest.mark.parametrize("stage", ["bridge", "contrastive"])
def test_broken_weights_are_named(copied: Path, stage: str) -> None:
    weights = copied / stage / "model.safetensors"
    state = load_file(weights)
    save_file({name: torch.full_like(value, torch.nan) for name, value in state.items()}, weights, {"format": "pt"})
    with pytest.raises(CocoaError, match=r"not finite.*broken"):
        diagnose(copied / stage, device="cpu")


def test_unusable_devices_folders_and_data_are_refused(trained: Run, tmp_path: Path) -> None:
    bridge = trained.out / "bridge"
    with pytest.raises(UsageError, match="--device nonsense cannot be used"):
        diagnose(bridge, device="nonsense")
    with pytest.raises(UsageError, match="--rows is 1; at least two are needed"):
        diagnose(bridge, rows=1)
    for folder in (tmp_path / "nowhere", trained.out):
        with pytest.raises(CocoaError, match="is not a checkpoint"):
            diagnose(folder)
    write_images(tmp_path, "a")
    write_table(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "a square"}] * 2)
    with pytest.raises(CocoaError, match="has one image; at least two are needed"):
        diagnose(bridge, data=tmp_path)


def test_the_json_document_and_the_lines_have_the_same_metrics(
    trained: Run, of_bridge: Diagnosis, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(trained.out / "bridge", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "checkpoint": str(trained.out / "bridge"),
        "rows": HELD_OUT,
        "source": "rows that the bridge stage held out of its training",
        "held_out_by": "bridge",
        "seen_by": ["warmup"],
        "masked_tokens": pytest.approx(of_bridge.masked_tokens),
        "geometry": pytest.approx(of_bridge.geometry),
    }
    assert f"{trained.out / 'bridge'}: 4 rows that the bridge stage held out of its training" in err
    assert "trained on the same data: warmup" in err
    assert of_bridge.masked_tokens is not None
    matching, shuffled, _ = of_bridge.masked_tokens.values()
    assert f"matched minus shuffled {100 * (matching - shuffled):+.1f} points" in err
    assert all(f"{value:.3f}" in err for value in of_bridge.geometry.values())
