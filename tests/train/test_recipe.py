from functools import reduce
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import yaml

from cocoa_embed.data.mmeb import TRAIN_SUBSETS
from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.recipe import Recipe, recipe_names

MINIMAL: dict[str, Any] = {
    "name": "small",
    "backbone": "scene-captioner",
    "data": {"folder": "data/train"},
    "bridge": {"steps": 3, "batch_size": 2},
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def at(recipe: Recipe, key: str) -> Any:  # noqa: ANN401
    """Return the value at ``key.sub``."""
    return reduce(getattr, key.split("."), recipe)


def test_a_recipe_takes_the_rest_from_the_method(recipe_file: Path) -> None:
    stages = [f"{stage}.{key}=1" for stage in ("warmup", "contrastive") for key in ("steps", "batch_size")]
    recipe = Recipe.load(recipe_file, stages)
    assert recipe.data_of("bridge").folder == Path("data/train")
    expected = {
        "warmup": {"text_mask_ratio": 0.2, "image_mask_ratio": 0.5, "mae_weight": 0.5, "patch_fill": "noise"},
        "bridge": {"steps": 3, "mask_ratio": 0.7, "eos_attends_to_b": True, "learning_rate": 2e-5, "warmup_steps": 100},
        "contrastive": {"temperature": 0.02, "schedule": "linear"},
    }
    for stage, values in expected.items():
        assert {key: at(recipe, f"{stage}.{key}") for key in values} == values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bakcbone=x", "unknown key 'bakcbone' (did you mean 'backbone'? known: name, "),
        ("zzzz=1", "unknown key 'zzzz' (known: name, backbone, data"),
        ("bridge.stesp=1", "unknown key 'bridge.stesp' (did you mean 'steps'? "),
        ("bridge.data.foldr=x", "unknown key 'bridge.data.foldr' (did you mean 'folder'? known: "),
        ("bridge.text_mask_ratio=0.5", "unknown key 'bridge.text_mask_ratio' (did you mean 'mask_ratio'? "),
        ("folder=x", "unknown key 'folder' (did you mean 'data.folder'?)"),
        (
            "learning_rate=1e-4",
            "unknown key 'learning_rate' (did you mean 'warmup.learning_rate' or 'moca.learning_rate' or "
            "'bridge.learning_rate' or 'contrastive.learning_rate'?)",
        ),
        ("bridge={steps: 1}", "key 'bridge.batch_size' is missing"),
        ("bridge.steps=0", "bridge.steps = 0: input should be greater than 0"),
        ("bridge.min_steps=9", "bridge: min_steps goes with epochs; leave it out when steps is given"),
        ("bridge={steps: 1, epochs: 1, batch_size: 1}", "bridge: give either steps or epochs"),
        ("bridge.steps=2.5", "bridge.steps = 2.5: input should be a valid integer"),
        ("contrastive.mini_batch_tokens=0", "contrastive.mini_batch_tokens = 0: input should be greater than 0"),
        ("warmup.mini_batch_size=all", "warmup.mini_batch_size = 'all': input should be 'auto'"),
        ("contrastive.mini_batch_size=8", "unknown key 'contrastive.mini_batch_size'"),
        ("bridge.mask_ratio=1.5", "bridge.mask_ratio = 1.5: input should be less than or equal to 1"),
        ("bridge.mask_ratio=0", "bridge.mask_ratio = 0: input should be greater than 0"),
        ("bridge.schedule=triangle", "bridge.schedule = 'triangle': input should be 'linear'"),
        ("bridge=5", "bridge = 5: input should be a valid dictionary"),
        ("seed.x=1", "seed = {'x': 1}: input should be a valid integer"),
        ("seed=4294967296", "seed = 4294967296: "),
        *((f"name={name}", f": name: {name!r} cannot name a folder") for name in ("../esc", "..", ".", "a\\b")),
        ("name=''", ": name: '' cannot name a folder"),
        ("bridge", "Override 'bridge' is not of the form key.sub=value"),
        ("=7", "Override '=7' is not of the form key.sub=value"),
        ("name.sub=1", "Override 'name.sub=1': name is a value and has no keys of its own"),
        *((f"bridge.epochs={text}", f"'{text}': input should be a finite number") for text in ("inf", "nan")),
        ("data.weight=.inf", "data.weight = inf: input should be a finite number"),
        ("data.streaming=true", "unknown key 'data.streaming'"),
        ("data.subsets={}", "data.subsets = {}: dictionary should have at least 1 item"),
        ("bridge.steps=[1", "Override 'bridge.steps=[1': '[1' is not a YAML value"),
    ],
)
def test_a_wrong_key_value_or_override_is_refused_by_name(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load(recipe_file, [override])
    assert message in str(caught.value)
    assert str(caught.value).startswith((f"{recipe_file}: ", f"Override {override!r}"))


ODD_TEXTS = ["2024", "2024-01-31", "my: folder", "no", "[a]", "# b", "a b", "~user", "..a b.c", "a=b"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["bridge.steps=7", "bridge.steps=9"], {"bridge.steps": 9, "bridge.batch_size": 2}),
        (["bridge.epochs=2"], {"bridge.epochs": 2, "bridge.steps": None}),
        (
            ["bridge.epochs=2", "bridge.min_steps=9", "bridge.steps=7"],
            {"bridge.epochs": None, "bridge.min_steps": None},
        ),
        (["bridge.steps=7", "bridge.epochs=null"], {"bridge.steps": 7}),
        (["bridge=null", "warmup.steps=2", "warmup.batch_size=4"], {"bridge": None, "warmup.batch_size": 4}),
        *(([f"data.folder={text}"], {"data.folder": Path(text)}) for text in ODD_TEXTS),
        *(([f"prompts.query={text}: ", f"name={text}"], {"prompts.query": f"{text}: "}) for text in ODD_TEXTS),
        (['prompts.query="a: "', "prompts.document='b'"], {"prompts.query": "a: ", "prompts.document": "b"}),
        (["data.folder=null"], {"data.folder": None}),
    ],
)
def test_overrides_change_the_recipe_in_their_order(
    recipe_file: Path, overrides: list[str], expected: dict[str, Any]
) -> None:
    """Paths and texts are taken as they are written, which YAML could read as numbers, dates or mappings."""
    recipe = Recipe.load(recipe_file, overrides)
    assert {key: at(recipe, key) for key in expected} == expected


def test_subsets_have_the_names_that_are_written(recipe_file: Path) -> None:
    """YAML would read them as a date, a truth value and a number."""
    names = ["2024-05-01", "no", "0x10", "1.0"]
    subsets = ", ".join(f"{name}: {{file: a.csv}}" for name in names)
    assert list(Recipe.load(recipe_file, [f"data.subsets={{{subsets}}}"]).sources_of("bridge")) == names
    recipe_file.write_text(f"{recipe_file.read_text()}contrastive: {{data: {{subsets: {{{subsets}}}}}, epochs: 1, "
                           "batch_size: 2}\n")  # fmt: skip
    assert list(Recipe.load(recipe_file).sources_of("contrastive")) == names


def test_a_tilde_stands_for_the_users_folder(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(recipe_file.parent))
    given = ["data.folder=~/photos", "bridge.data.images=~/pictures", "vision_cache=~/cache", "backbone=~/model"]
    recipe, home = Recipe.load(recipe_file, [*given, "bridge.data.file=~/a/*.csv"]), recipe_file.parent
    assert recipe.data is not None
    assert (recipe.data.folder, recipe.vision_cache) == (home / "photos", home / "cache")
    assert recipe.backbone == str(home / "model")
    (source,) = recipe.sources_of("bridge").values()
    assert (source.images, source.file) == (home / "pictures", str(home / "a" / "*.csv"))


def test_an_unknown_recipe_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        Recipe.load("tinny")
    assert "No recipe 'tinny'" in str(caught.value)
    assert f"(did you mean 'tiny'? known: {', '.join(recipe_names())})" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"- a\n- b\n", b"name: [a\nbackbone: b", b"name: caf\xe9\n", b"name: a\ndata: &a {subsets: {x: *a}}\n"],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "small.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Recipe.load(path)
    message = " is not valid YAML: " if b"name" in content else " is not a recipe; expected keys such as name"
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read_is_refused(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(UsageError, match=r"small\.yaml cannot be read \(Permission denied\)"):
        Recipe.load(recipe_file)
    with pytest.raises(UsageError, match="No recipe 'xxx"):
        Recipe.load("x" * 300)


def test_a_recipe_read_back_from_json_gives_every_stage_its_data() -> None:
    """A checkpoint's record is read back: inherited keys must not become defaults of the stage's own."""
    stage = {"steps": 1, "batch_size": 2}
    subsets = {"a": {"file": "a.csv"}, "b": {"file": "b.csv", "limit": 3}}
    recipe = Recipe.parse(
        {
            **MINIMAL,
            "data": {"folder": "data/train", "captions": "captions", "paraphrases": 2, "on_bad_row": "skip"},
            "warmup": stage,
            "bridge": {**stage, "data": {"limit": 7}},
            "contrastive": {**stage, "data": {"images": "pictures", "limit": 9, "subsets": subsets}},
        }
    )
    again = Recipe.parse(yaml.safe_load(recipe.model_dump_json()))
    for name in recipe.stages:
        assert again.sources_of(name) == recipe.sources_of(name)
        assert again.data_of(name) == recipe.data_of(name)
    assert again.sources_of("bridge")["data"].folder == Path("data/train")
    of_subsets = again.sources_of("contrastive").values()
    assert [(source.limit, source.images) for source in of_subsets] == [(9, Path("pictures")), (3, Path("pictures"))]


def sources(**data: Any) -> dict[str, Any]:
    return Recipe.parse({**MINIMAL, "data": data}).sources_of("bridge")


def test_the_mmeb_layout_alone_stands_for_its_in_domain_subsets(tmp_path: Path) -> None:
    found = sources(mmeb=str(tmp_path), limit=7)
    assert tuple(found) == TRAIN_SUBSETS
    assert {(source.mmeb, source.limit, source.config) for source in found.values()} == {(str(tmp_path), 7, None)}
    found = sources(mmeb="some/set", subsets={"CIRR": {"weight": 2}, "text": {"file": "rows.csv"}})
    assert [(name, source.mmeb, source.file) for name, source in found.items()] == [
        ("CIRR", "some/set", None),
        ("text", None, "rows.csv"),
    ]
    (tmp_path / "train.parquet").touch()
    assert list(sources(mmeb=str(tmp_path))) == list(sources(mmeb="some/set", config="CIRR")) == ["data"]


PAPER = {
    "warmup": {"steps": 3000, "batch_size": 128, "warmup_steps": 100},
    "bridge": {"epochs": 2, "batch_size": 64, "warmup_steps": 100, "mask_ratio": 0.7},
    "contrastive": {"steps": 2000, "batch_size": 1024, "warmup_steps": 200, "mini_batch_tokens": "auto",
                    "temperature": 0.02, "directions": "forward"},
}  # fmt: skip
ADAPTER = {"kind": "dora", "r": 8, "alpha": 64, "dropout": 0.1}


@pytest.mark.parametrize("name", recipe_names())
def test_the_packages_recipes_are_valid_and_have_the_papers_settings(name: str) -> None:
    assert Recipe.load(name).name == name
    if name in ("tiny", "photos", "own-folder", "smolvlm-256m", "internvl3-1b") or name.startswith("moca-"):
        return
    recipe = Recipe.load(name, ["bridge.adapter.r=16"])
    for stage, expected in PAPER.items():
        # An override changes its own stage alone: the recipes give the adapter once, by a YAML alias.
        adapter = {**ADAPTER, "r": 16} if stage == "bridge" else ADAPTER
        settings = recipe.stages[stage].settings.model_dump()
        expected = {**expected, "learning_rate": 2e-5, "schedule": "linear", "adapter": adapter, "freeze_vision": False}
        assert {key: settings[key] for key in expected} == expected
    assert [recipe.data_of(stage).limit for stage in ("warmup", "contrastive")] == [20_000, 100_000]


def test_mocas_recipes_pool_the_mean_and_have_no_stage_of_cocoa_but_the_contrastive_one() -> None:
    for name in ("moca-tiny", "moca-qwen2.5-vl-3b"):
        recipe = Recipe.load(name)
        assert (recipe.pooling, list(recipe.stages)) == ("mean", ["moca", "contrastive"])
    authors = {"text_mask_ratio": 0.4, "image_mask_ratio": 0.5, "mae_weight": 0.1, "learning_rate": 2e-6}
    assert {key: at(recipe, f"moca.{key}") for key in authors} == authors
    authors = {"temperature": 0.03, "hard_negatives": 2, "learning_rate": 2e-5, "adapter": None}
    assert {key: at(recipe, f"contrastive.{key}") for key in authors} == authors


@pytest.mark.parametrize(
    ("images", "steps"), [(1000, [200, 500, 75]), (10_000, [313, 625, 200]), (100_000, [3125, 6250, 1955])]
)
def test_the_recipe_for_an_own_folder_scales_with_it(images: int, steps: list[int]) -> None:
    stages = Recipe.load("own-folder").stages.values()
    rows = RowTable.of([Row(Item("a"), Item("b"), "row")]).select(np.zeros(images))
    assert [stage.step_count(rows) for stage in stages] == steps
    assert all(count * stage.settings.batch_size <= 20 * images for count, stage in zip(steps, stages, strict=True))


@pytest.mark.parametrize("name", ["own-folder", "smolvlm-256m", "internvl3-1b"])
def test_the_recipes_for_an_own_folder_use_all_captions_and_the_bridge_text_only_rows(name: str) -> None:
    data = {stage: Recipe.load(name).data_of(stage) for stage in ("warmup", "bridge", "contrastive")}
    assert {stage: (each.captions, each.paraphrases) for stage, each in data.items()} == {
        "warmup": ("captions", 0),
        "bridge": ("captions", 2),
        "contrastive": ("captions", 0),
    }


def test_wrong_keys_and_missing_folders_are_found_together() -> None:
    """And before torch is imported: tests/cli/test_cli.py."""
    with pytest.raises(
        UsageError, match=r"'bridge\.stesp' \(did you mean 'steps'.*; data\.folder photoz does not exist"
    ):
        Recipe.load("tiny", ["bridge.stesp=1", "data.folder=photoz"], check_paths=True)


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("data.folder=nowhere", "data.folder nowhere does not exist"),
        ("bridge.data.images=nowhere", "data.images nowhere does not exist"),
        ("bridge.data={file: nowhere/*.csv}", "data.file nowhere/*.csv does not exist"),
        ("bridge.data={hub: ./nowhere}", "data.hub ./nowhere does not exist"),
        ("backbone=scene-captoner", "backbone scene-captoner does not exist (did you mean 'scene-captioner'?"),
        ("backbone=./nowhere", "backbone ./nowhere does not exist"),
        *((f"{key}={'x' * 300}", f"{key} xxx") for key in ("data.folder", "backbone")),
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
    (tmp_path / "part[1]").mkdir()
    (tmp_path / "part[1]" / "a.csv").touch()
    matched = ["data.folder=nowhere", "bridge.data={file: 'part[1]/*.csv'}"]
    assert Recipe.load(recipe_file, matched, check_paths=True), "a folder whose name looks like a pattern"
