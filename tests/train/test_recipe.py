import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cocoa_embed.data.mmeb import TRAIN_SUBSETS
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.train.recipe import Recipe, recipe_names

ROOT = Path(__file__).parents[2]

MINIMAL = """
name: small
backbone: scene-captioner
data: {folder: data/train}
bridge:
  steps: 3
  batch_size: 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def test_a_recipe_takes_the_rest_from_the_method(recipe_file: Path) -> None:
    stages = [f"{stage}.{key}=1" for stage in ("warmup", "contrastive") for key in ("steps", "batch_size")]
    recipe = Recipe.load(recipe_file, stages)
    assert (recipe.name, recipe.backbone, recipe.data_of("bridge").folder) == (
        "small",
        "scene-captioner",
        Path("data/train"),
    )
    warmup, bridge, contrastive = recipe.warmup, recipe.bridge, recipe.contrastive
    assert warmup is not None
    assert bridge is not None
    assert contrastive is not None
    assert (warmup.text_mask_ratio, warmup.image_mask_ratio, warmup.mae_weight) == (0.2, 0.5, 0.5)
    assert (warmup.patch_fill, warmup.normalise_targets) == ("noise", False)
    assert (bridge.steps, bridge.batch_size) == (3, 2)
    assert (bridge.mask_ratio, bridge.eos_attends_to_b, bridge.schedule) == (0.7, True, "linear")
    assert (bridge.learning_rate, bridge.warmup_steps) == (2e-5, 100)
    assert contrastive.temperature == 0.02


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("bakcbone: x", "unknown key 'bakcbone' (did you mean 'backbone'? known: name, "),
        ("warm_up: {}", "unknown key 'warm_up' (did you mean 'warmup'? known: name, "),
        ("zzzz: 1", "unknown key 'zzzz' (known: name, backbone, data"),
        ("  mask_ration: 0.5", "unknown key 'bridge.mask_ration' (did you mean 'mask_ratio'? known: "),
        ("  data: {foldr: x, folder: x}", "unknown key 'bridge.data.foldr' (did you mean 'folder'? known: "),
        ("  text_mask_ratio: 0.5", "unknown key 'bridge.text_mask_ratio' (did you mean 'mask_ratio'? "),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(tmp_path: Path, added: str, message: str) -> None:
    path = write(tmp_path, MINIMAL + added + "\n")
    with pytest.raises(UsageError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("line", "key"), [("name: small", "name"), ("  batch_size: 2", "bridge.batch_size")])
def test_a_missing_key_is_named(tmp_path: Path, line: str, key: str) -> None:
    assert line in MINIMAL
    with pytest.raises(UsageError, match=f"key '{re.escape(key)}' is missing"):
        Recipe.load(write(tmp_path, MINIMAL.replace(line + "\n", "")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bridge.steps=0", "bridge.steps = 0: input should be greater than 0"),
        ("bridge.steps=2.5", "bridge.steps = 2.5: input should be a valid integer"),
        ("bridge.mask_ratio=1.5", "bridge.mask_ratio = 1.5: input should be less than or equal to 1"),
        ("bridge.mask_ratio=0", "bridge.mask_ratio = 0: input should be greater than 0"),
        ("bridge.schedule=triangle", "bridge.schedule = 'triangle': input should be 'linear'"),
        ("mixed_precision=fp16", "mixed_precision = 'fp16': input should be 'no' or 'bf16'"),
        ("bridge=5", "bridge = 5: input should be a valid dictionary"),
        ("seed.x=1", "seed = {'x': 1}: input should be a valid integer"),
        ("seed=-1", "seed = -1: "),
        ("seed=4294967296", "seed = 4294967296: "),
        (
            "learning_rate=1e-4",
            "unknown key 'learning_rate' (did you mean 'warmup.learning_rate' or 'bridge.learning_rate' or "
            "'contrastive.learning_rate'?)",
        ),
        ("folder=x", "unknown key 'folder' (did you mean 'data.folder'?)"),
        ("bridge.stesp=1", "unknown key 'bridge.stesp' (did you mean 'steps'? "),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_itself(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load(recipe_file, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["../esc", "..", ".", "", "a\\b", "a\0b"])
def test_a_name_that_is_no_folder_name_is_refused(recipe_file: Path, name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"recipe: name: {name!r} cannot name a folder in runs/; use no")):
        Recipe.parse({**yaml.safe_load(MINIMAL), "name": name})
    assert Recipe.load(recipe_file, ["name=..a b.c"]).name == "..a b.c"


def test_overrides_change_the_recipe_in_their_order(recipe_file: Path) -> None:
    overrides = ["bridge.steps=7", "bridge.learning_rate=3e-5", "bridge.steps=9", "prompts.query='find: '", "name=a=b"]
    recipe = Recipe.load(recipe_file, overrides)
    assert recipe.bridge is not None
    assert (recipe.bridge.steps, recipe.bridge.learning_rate, recipe.bridge.batch_size) == (9, 3e-5, 2)
    assert (recipe.name, recipe.prompts.query) == ("a=b", "find: ")
    assert Recipe.load(recipe_file).bridge != recipe.bridge


def test_null_leaves_a_stage_out_and_a_sub_key_brings_one_in(recipe_file: Path) -> None:
    overrides = ["bridge=null", "warmup.steps=2", "warmup.batch_size=4"]
    recipe = Recipe.load(recipe_file, overrides)
    assert recipe.bridge is None
    assert recipe.warmup is not None
    assert (recipe.warmup.steps, recipe.warmup.batch_size) == (2, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bridge", " is not of the form key.sub=value"),
        ("=7", " is not of the form key.sub=value"),
        ("name.sub=1", ": name is a value and has no keys of its own"),
        ("bridge.steps=[1", ": '[1' is not a YAML value"),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"Override {override!r}{message}")):
        Recipe.load(recipe_file, [override])


def test_an_unknown_recipe_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        Recipe.load("tinny")
    assert "No recipe 'tinny'" in str(caught.value)
    assert f"(did you mean 'tiny'? known: {', '.join(recipe_names())})" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " holds no recipe; expected keys such as name"),
        (b"- a\n- b\n", " holds no recipe; expected keys such as name"),
        (b"name: [a\nbackbone: b", " is not valid YAML: "),
        (b"name: caf\xe9\n", " is not valid YAML: "),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(f"{path}{message}")) as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_read_back_from_json_gives_every_stage_its_data() -> None:
    """A checkpoint's record is read back: inherited keys must not become defaults of the stage's own."""
    recipe = Recipe.parse(
        {
            "name": "parts",
            "backbone": "scene-captioner",
            "data": {"folder": "data/train", "captions": "captions", "paraphrases": 2, "on_bad_row": "skip"},
            "warmup": {"steps": 1, "batch_size": 2},
            "bridge": {"steps": 1, "batch_size": 2, "data": {"limit": 7}},
            "contrastive": {
                "steps": 1,
                "batch_size": 2,
                "data": {
                    "images": "pictures",
                    "limit": 9,
                    "subsets": {"a": {"file": "a.csv"}, "b": {"file": "b.csv", "limit": 3}},
                },
            },
        }
    )
    again = Recipe.parse(yaml.safe_load(recipe.model_dump_json()))
    for stage in recipe.stages:
        assert again.sources_of(stage) == recipe.sources_of(stage)
        assert again.data_of(stage) == recipe.data_of(stage)
    assert again.sources_of("bridge")["data"].folder == Path("data/train")
    assert [source.limit for source in again.sources_of("contrastive").values()] == [9, 3]
    assert {source.images for source in again.sources_of("contrastive").values()} == {Path("pictures")}


@pytest.mark.parametrize("folder", ["2024", "2024-01-31", "my: folder", "no", "[a]", "# b", "a b", "~user"])
def test_a_path_or_a_text_is_taken_as_it_is_written(recipe_file: Path, folder: str) -> None:
    recipe = Recipe.load(recipe_file, [f"data.folder={folder}", f"prompts.query={folder}: ", f"name={folder}"])
    assert recipe.data_of("bridge").folder == Path(folder)
    assert (recipe.prompts.query, recipe.name) == (f"{folder}: ", folder)


def test_a_quoted_text_loses_its_quotes_and_null_is_none(recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file, ['prompts.query="a: "', "prompts.document='b'", "data.folder=null"])
    assert (recipe.prompts.query, recipe.prompts.document) == ("a: ", "b")
    assert recipe.data is not None
    assert recipe.data.folder is None


def mmeb_recipe(**data: Any) -> Recipe:
    return Recipe.parse({"name": "r", "backbone": "b", "data": data, "bridge": {"epochs": 1, "batch_size": 2}})


def test_the_mmeb_layout_alone_stands_for_its_in_domain_subsets(tmp_path: Path) -> None:
    sources = mmeb_recipe(mmeb=str(tmp_path), limit=7).sources_of("bridge")
    assert tuple(sources) == TRAIN_SUBSETS
    assert len(sources) == 20
    assert {(source.mmeb, source.limit, source.config) for source in sources.values()} == {(str(tmp_path), 7, None)}


def test_an_mmeb_source_that_names_its_subsets_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").touch()
    assert list(mmeb_recipe(mmeb=str(tmp_path)).sources_of("bridge")) == ["data"]
    assert list(mmeb_recipe(mmeb="some/set", config="CIRR").sources_of("bridge")) == ["data"]
    subsets = {"CIRR": {"weight": 2}, "text": {"file": "rows.csv"}}
    sources = mmeb_recipe(mmeb="some/set", subsets=subsets).sources_of("bridge")
    assert {name: (source.mmeb, source.file) for name, source in sources.items()} == {
        "CIRR": ("some/set", None),
        "text": (None, "rows.csv"),
    }


PAPER = {
    "warmup": {"steps": 3000, "batch_size": 128, "warmup_steps": 100},
    "bridge": {"epochs": 2, "batch_size": 64, "warmup_steps": 100, "mask_ratio": 0.7},
    "contrastive": {"steps": 2000, "batch_size": 1024, "warmup_steps": 200, "mini_batch_size": 8, "temperature": 0.02,
                    "directions": "forward"},
}  # fmt: skip
ADAPTER = {"kind": "dora", "r": 8, "alpha": 64, "dropout": 0.1}


@pytest.mark.parametrize("name", recipe_names())
def test_the_packages_recipes_are_valid_and_have_the_papers_settings(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    if name == "tiny":
        return
    for stage, expected in PAPER.items():
        settings = recipe.stages[stage].settings.model_dump()
        expected = {**expected, "learning_rate": 2e-5, "schedule": "linear", "adapter": ADAPTER, "freeze_vision": False}
        assert {key: settings[key] for key in expected} == expected
    assert [recipe.data_of(stage).limit for stage in ("warmup", "contrastive")] == [20_000, 100_000]


def test_an_override_changes_its_own_stage_alone() -> None:
    """The recipes give the adapter once, by a YAML alias."""
    recipe = Recipe.load("qwen2-vl-2b", ["bridge.adapter.r=16"])
    stages = (recipe.warmup, recipe.bridge, recipe.contrastive)
    assert [settings.adapter.r for settings in stages if settings and settings.adapter] == [8, 16, 8]


WITHOUT_TORCH = """
import sys
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.train import Recipe
try:
    Recipe.load("tiny", ["bridge.stesp=1", "data.folder=photoz"], check_paths=True)
except UsageError as error:
    print(error)
print({"torch", "transformers", "accelerate", "datasets"} & set(sys.modules))
"""


def test_wrong_keys_and_missing_folders_are_found_together_and_without_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    message, loaded = done.stdout.splitlines()
    assert "unknown key 'bridge.stesp' (did you mean 'steps'?" in message
    assert message.endswith("; data.folder photoz does not exist.")
    assert loaded == "set()"


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("data.folder=nowhere", "data.folder nowhere does not exist"),
        ("bridge.data.images=nowhere", "data.images nowhere does not exist"),
        ("bridge.data={file: nowhere/*.csv}", "data.file nowhere/*.csv does not exist"),
        ("bridge.data={hub: ./nowhere}", "data.hub ./nowhere does not exist"),
        ("backbone=scene-captoner", "backbone scene-captoner does not exist (did you mean 'scene-captioner'?"),
        ("backbone=./nowhere", "backbone ./nowhere does not exist"),
    ],
)
def test_local_paths_that_a_stage_reads_are_checked_if_asked_for(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, missing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    assert Recipe.load(recipe_file, [override])
    with pytest.raises(CocoaError) as caught:
        Recipe.load(recipe_file, [override], check_paths=True)
    assert missing in str(caught.value)
    unread = ["data.folder=nowhere", "bridge.data={folder: data/train}", "backbone=owner/on-the-hub"]
    assert Recipe.load(recipe_file, unread, check_paths=True), "what no stage reads may be missing"
