import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from exported import PROMPTS
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from cocoa_embed.cli import main as cli
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.export import export_model
from cocoa_embed.train import diagnosis
from cocoa_embed.train.data.rows import read_image_folder
from cocoa_embed.train.diagnosis import Diagnosis, diagnose
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.record import StageResult
from conftest import TINY_MAX_LENGTH

KEPT = 4
STAGE: dict[str, Any] = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}
ACCURACIES = ("accuracy_matching_image", "accuracy_shuffled_image", "accuracy_no_image")
GEOMETRY = ("alignment", "uniformity", "modality_gap", "effective_rank")


class Run(NamedTuple):
    recipe: Recipe
    out: Path
    results: dict[str, StageResult]


@pytest.fixture(scope="module")
def finished(tiny_backbone_path: Path, scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose contrastive stage sees three of the four images that its bridge keeps out."""
    values = {
        "name": "test",
        "backbone": str(tiny_backbone_path),
        "max_length": TINY_MAX_LENGTH,
        "prompts": PROMPTS,
        "seed": 3,
        "data": {"folder": str(scene_folder)},
        "warmup": STAGE,
        "bridge": {
            **STAGE,
            "steps": 24,
            "batch_size": 8,
            "logging_steps": 24,
            "probe_rows": KEPT,
            "eos_attends_to_b": False,
            "mask_ratio": 0.4,
        },
        "contrastive": {**STAGE, "batch_size": 2, "data": {"limit": KEPT - 1}},
    }
    recipe, out = Recipe.parse(values), tmp_path_factory.mktemp("run") / "out"
    return Run(recipe, out, {result.stage: result for result in run(recipe, out)})


@pytest.fixture(scope="module")
def of_bridge(finished: Run) -> Diagnosis:
    return diagnose(finished.out / "bridge", device="cpu")


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Path:
    """A copy of the run, for a test to spoil."""
    return Path(shutil.copytree(finished.out, tmp_path / "copied"))


def test_a_bridge_is_measured_as_it_was_when_its_training_ended(finished: Run, of_bridge: Diagnosis) -> None:
    """On the same rows, with the same tokens hidden, and with the recipe's prompts and mask."""
    assert of_bridge.hidden_tokens is not None
    assert tuple(of_bridge.hidden_tokens) == ACCURACIES
    assert tuple(of_bridge.geometry) == GEOMETRY
    last = finished.results["bridge"].final
    assert of_bridge.hidden_tokens == pytest.approx({name: last[name] for name in ACCURACIES}, abs=1e-6)
    assert of_bridge.geometry == pytest.approx({name: last[name] for name in GEOMETRY}, rel=1e-4)
    assert all(0 < share < 1 for share in of_bridge.hidden_tokens.values()), "they could be others"


@pytest.mark.parametrize(
    "changes",
    [{"prompts": {"query": "", "document": ""}}, {"seed": 4}, {"bridge": {"mask_ratio": 0.9}}],
)
def test_prompts_seed_and_section_are_the_recipes(
    finished: Run, of_bridge: Diagnosis, copied: Path, changes: dict[str, Any]
) -> None:
    """What the figures depend on, and so what has to come from the checkpoint."""
    record = copied / "bridge" / "cocoa_training.json"
    training = json.loads(record.read_text())
    for key, value in changes.items():
        training["recipe"][key] = {**training["recipe"][key], **value} if isinstance(value, dict) else value
    record.write_text(json.dumps(training))
    changed = diagnose(copied / "bridge", device="cpu")
    assert (changed.geometry == pytest.approx(of_bridge.geometry, rel=1e-4)) is ("prompts" not in changes)
    assert (changed.hidden_tokens == of_bridge.hidden_tokens) is ("prompts" in changes)


def test_it_says_which_rows_were_measured_and_who_was_trained_on_them(
    finished: Run, of_bridge: Diagnosis, scene_folder: Path
) -> None:
    rows = read_image_folder(scene_folder)
    assert of_bridge.chosen.rows == rows[:KEPT]
    assert of_bridge.chosen.kept_out
    assert of_bridge.chosen.trained_on == {"warmup": KEPT, "bridge": 0}
    assert diagnose(finished.out / "warmup", device="cpu").chosen.trained_on == {"warmup": KEPT}
    after = diagnose(finished.out / "contrastive", device="cpu").chosen
    assert after.trained_on == {"warmup": KEPT, "bridge": 0, "contrastive": KEPT - 1}
    assert after.rows == rows[:KEPT]


def test_the_first_rows_are_measured_with_the_tokens_that_are_hidden_in_them_anyway(finished: Run) -> None:
    two = diagnose(finished.out / "bridge", rows=2, device="cpu")
    assert len(two.chosen.rows) == 2
    many = diagnose(finished.out / "bridge", rows=100, device="cpu")
    assert len(many.chosen.rows) == KEPT, "no more were kept out"


def test_without_a_head_the_geometry_is_measured_alone(finished: Run, of_bridge: Diagnosis, tmp_path: Path) -> None:
    found = diagnose(finished.out / "contrastive", device="cpu")
    assert found.hidden_tokens is None
    assert tuple(found.geometry) == GEOMETRY
    for stage, expected in (("bridge", of_bridge), ("contrastive", found)):
        exported = diagnose(export_model(finished.out / stage, tmp_path / stage), device="cpu")
        assert exported.hidden_tokens is None
        assert exported.geometry == pytest.approx(expected.geometry, rel=1e-4)
        assert exported.chosen == expected.chosen
    assert found.geometry != pytest.approx(of_bridge.geometry, rel=1e-2)


def test_a_folder_takes_the_place_of_the_rows_kept_out(
    finished: Run, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image_folder(tmp_path / "other", "train", 6, seed=9)
    other = diagnose(finished.out / "bridge", data=tmp_path / "other", device="cpu")
    assert other.chosen.rows == read_image_folder(tmp_path / "other")
    assert other.chosen.trained_on == {"warmup": 0, "bridge": 0}
    assert not other.chosen.kept_out
    assert other.hidden_tokens is not None
    # The same images by another name of their folder; the bridge trains on all but four.
    monkeypatch.chdir(scene_folder)
    same = diagnose(finished.out / "contrastive", data=Path("."), rows=10, device="cpu")
    assert same.chosen.trained_on == {"warmup": 10, "bridge": 10 - KEPT, "contrastive": KEPT - 1}
    assert len(same.chosen.rows) == 10


def test_sixty_four_rows_of_a_folder_do(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "ROWS", 5)
    write_image_folder(tmp_path / "other", "train", 7, seed=9)
    assert len(diagnose(finished.out / "bridge", data=tmp_path / "other", device="cpu").chosen.rows) == 5


def test_a_stage_whose_data_is_gone_cannot_be_told_of(
    finished: Run, tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(scene_folder, tmp_path / "moved")
    values = finished.recipe.model_dump(mode="json", exclude_unset=True)
    values |= {"warmup": None, "backbone": str(finished.out / "warmup"), "data": {"folder": str(tmp_path / "moved")}}
    values["bridge"] |= {"steps": 1}
    values["contrastive"] |= {"steps": 1, "data": {"folder": str(scene_folder)}}
    run(Recipe.parse(values), tmp_path / "out")
    found = diagnose(tmp_path / "out" / "bridge", device="cpu")
    assert found.chosen.trained_on == {"warmup of an earlier run": None, "bridge": 0}
    shutil.rmtree(tmp_path / "moved")
    found = diagnose(tmp_path / "out" / "contrastive", data=scene_folder, rows=3, device="cpu")
    assert found.chosen.trained_on == {"warmup of an earlier run": None, "bridge": None, "contrastive": 3}


def test_nothing_is_written(finished: Run, of_bridge: Diagnosis) -> None:
    assert sorted(path.name for path in finished.out.iterdir()) == sorted(
        [".cocoa-run", "data.json", "recipe.json", "warmup", "bridge", "contrastive"]
    )


# The command

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["diagnose", *map(str, arguments), "--device", "cpu"])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def test_the_json_document(finished: Run, of_bridge: Diagnosis, command: Command) -> None:
    code, out, _ = command(finished.out / "bridge", "--json")
    assert code == 0
    assert json.loads(out) == {
        "checkpoint": str(finished.out / "bridge"),
        "rows": KEPT,
        "from": "rows that the bridge keeps out of its training",
        "kept_out": True,
        "trained_on": {"warmup": KEPT, "bridge": 0},
        "hidden_tokens": pytest.approx(of_bridge.hidden_tokens),
        "geometry": pytest.approx(of_bridge.geometry),
    }
    _, out, _ = command(finished.out / "contrastive", "--json")
    assert json.loads(out)["hidden_tokens"] is None


def test_people_are_told_the_same(finished: Run, of_bridge: Diagnosis, command: Command) -> None:
    code, out, err = command(finished.out / "bridge")
    assert (code, out) == (0, "")
    lines = [line for line in err.splitlines() if not line.startswith("Loading")]
    assert lines[0] == f"{finished.out / 'bridge'}: 4 rows that the bridge keeps out of its training"
    assert lines[1] == "  trained on by warmup (4 of them)"
    assert of_bridge.hidden_tokens is not None
    for share in of_bridge.hidden_tokens.values():
        assert f"{share:.1%}" in lines[2]
    assert [f"{figure:.3f}" in line for figure, line in zip(of_bridge.geometry.values(), lines[3:], strict=True)] == [
        True
    ] * 4
    _, _, err = command(finished.out / "contrastive", "--rows", 2)
    assert "2 rows" in err
    assert "not measured: the checkpoint has no language-model head" in err


def test_each_fault_is_one_sentence(
    finished: Run, scene_folder: Path, tmp_path: Path, command: Command, copied: Path
) -> None:
    def sentence(*arguments: object) -> str:
        code, out, err = command(*arguments)
        assert code == 1
        assert out == ""
        (line,) = (line for line in err.splitlines() if not line.startswith("Loading"))
        return line

    bridge = finished.out / "bridge"
    assert "is no checkpoint" in sentence(tmp_path / "nowhere")
    assert "is no checkpoint" in sentence(finished.out), "the run, and not a stage of it"
    assert "does not exist" in sentence(bridge, "--data", tmp_path / "nowhere")

    single = tmp_path / "single"
    single.mkdir()
    Image.new("RGB", (56, 56)).save(single / "one.png")
    line = json.dumps({"file_name": "one.png", "text": "a white square"})
    (single / "metadata.jsonl").write_text(f"{line}\n{line}\n")
    assert "has one image; two are needed" in sentence(bridge, "--data", single)
    (single / "metadata.jsonl").write_text(json.dumps({"file_name": "one.png", "text": " "}))
    assert "the row has no text" in sentence(bridge, "--data", single)
    (single / "metadata.jsonl").write_text(line.replace("one", "two"))
    assert "two.png" in sentence(bridge, "--data", single)
    (single / "two.png").write_bytes(b"no image")
    (single / "metadata.jsonl").write_text(f"{line}\n{line.replace('one', 'two')}")
    assert "two.png" in sentence(bridge, "--data", single)

    (copied / "bridge" / "cocoa_training.json").write_text("{}")
    assert "lacks one of" in sentence(copied / "bridge")


def changed_recipe(checkpoint: Path, **changes: Any) -> Path:
    record = checkpoint / "cocoa_training.json"
    training = json.loads(record.read_text())
    training["recipe"] |= changes
    record.write_text(json.dumps(training))
    return checkpoint


def test_rows_that_cannot_be_found_again_are_told(
    finished: Run, copied: Path, scene_folder: Path, tmp_path: Path
) -> None:
    bridge = {"steps": 1, "batch_size": 4}
    with pytest.raises(CocoaError, match=r"has no bridge.*give --data FOLDER\."):
        diagnose(changed_recipe(copied / "contrastive", bridge=None))
    with pytest.raises(CocoaError, match=r"kept no rows out \(probe_rows 0 of 24 images\); give --data"):
        diagnose(changed_recipe(copied / "warmup", bridge={**bridge, "probe_rows": 0}))
    with pytest.raises(CocoaError, match=r"kept no rows out \(probe_rows 64 of 24 images\)"):
        diagnose(changed_recipe(copied / "warmup", bridge=bridge))
    with pytest.raises(CocoaError, match=r"bridge's data of .* does not exist.*give --data FOLDER\."):
        diagnose(changed_recipe(copied / "bridge", data={"folder": str(tmp_path / "gone")}))
    fewer = {"folder": str(scene_folder), "limit": 20}
    kept = Path(shutil.copytree(finished.out / "bridge", copied / "bridge" / "step-2"))  # as snapshot_steps leaves one
    for checkpoint in (copied / "bridge", kept):
        with pytest.raises(CocoaError, match=r"rows have changed .*\(then .*24.*, now .*20.*\).*give --data FOLDER\."):
            diagnose(changed_recipe(checkpoint, data=fewer))


def test_what_cannot_be_asked_for_is_refused(finished: Run) -> None:
    with pytest.raises(UsageError, match="--device nonsense cannot be used"):
        diagnose(finished.out / "bridge", device="nonsense")
    with pytest.raises(UsageError, match="--rows is 1; two are needed"):
        diagnose(finished.out / "bridge", rows=1)


@pytest.mark.parametrize("stage", ["bridge", "contrastive"])
def test_broken_weights_are_told(copied: Path, stage: str) -> None:
    weights = copied / stage / "model.safetensors"
    state = load_file(weights)
    save_file({name: torch.full_like(value, torch.nan) for name, value in state.items()}, weights, {"format": "pt"})
    with pytest.raises(CocoaError, match=r"not finite.*broken"):
        diagnose(copied / stage, device="cpu")


def test_rows_left_out_of_training_are_left_out_here_too(finished: Run, scene_folder: Path, tmp_path: Path) -> None:
    """A run that skips broken images keeps other rows out than the first of its data."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    entries = (scene_folder / "metadata.jsonl").read_text().splitlines()
    lines = []
    for number in range(120):
        entry = json.loads(entries[number % len(entries)])
        name = f"{number}.png"
        shutil.copy(scene_folder / entry["file_name"], folder / name)
        lines.append(json.dumps({**entry, "file_name": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "1.png").write_bytes(b"no image")
    values = finished.recipe.model_dump(mode="json", exclude_unset=True)
    values |= {"warmup": None, "contrastive": None, "data": {"folder": str(folder), "on_bad_row": "skip"}}
    values["bridge"] |= {"steps": 1}
    (result,) = run(Recipe.parse(values), tmp_path / "out")
    found = diagnose(result.folder, device="cpu")
    rows = read_image_folder(folder)
    assert found.chosen.rows == [replace(rows[number]) for number in (0, 2, 3, 4)]
    assert found.geometry == pytest.approx({name: result.final[name] for name in GEOMETRY}, rel=1e-4)


def test_an_exported_model_is_measured_with_its_own_prompts(finished: Run, tmp_path: Path) -> None:
    out = export_model(finished.out / "contrastive", tmp_path / "exported")
    before = diagnose(out, device="cpu")
    model = SentenceTransformer(str(out), device="cpu")
    assert model.prompts == PROMPTS
    model.prompts = {"query": "", "document": ""}
    model.save(str(out), create_model_card=False)
    assert diagnose(out, device="cpu").geometry != pytest.approx(before.geometry, rel=1e-4)
