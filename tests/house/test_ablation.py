"""The ablation compares at equal compute, resumes, and draws the numbers in its results."""

import json
import random
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from scored_model import ScoredModel, write_captioned
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

import ablation
from arms.families import FAMILY, families, variations
from arms.figure import draw
from arms.grid import (
    ALL_THREE,
    ALONE,
    CAPTIONS_AS_PAIRS,
    EQUAL,
    FRACTIONS,
    LENGTHS,
    MOCA_ARM,
    NO_BRIDGE,
    Grid,
    Sizes,
    StageRun,
)
from arms.photos import BRIDGE_ONLY, FIRST, HALF, NO_PAIRS, ONLY_PAIRS, SETTINGS, PhotoGrid, PhotoSizes
from arms.runner import jobs_of, outcome, run_jobs, score
from arms.summary import SCORED, results_document, tables, values
from arms.workspace import UserFolders, Workspace
from cocoa_embed.demo.scenes import Scene, SceneObject, split_of
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation.pairs import evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.report.tables import to_markdown
from cocoa_embed.train.data.caption_rows import read_image_folder
from cocoa_embed.train.data.mixture import read_rows
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.stages.bridge.probe import hold_out_rows

ROOT = Path(__file__).parents[2]
PER_ROW = {"warmup": 0.42, "moca": 0.42, "bridge": 0.34, "contrastive": 0.35}
BATCH_SIZES = {"warmup": 32, "moca": 48, "bridge": 32, "contrastive": 64}
SIZES = Sizes(8000, 500, 1000, warmup_steps=200, bridge_steps=640, contrastive_steps=50)


def grid_of(sizes: Sizes) -> Grid:
    return Grid(sizes, PER_ROW, BATCH_SIZES, mask_ratio=0.5)


@pytest.fixture
def grid() -> Grid:
    return grid_of(SIZES)


@pytest.fixture(scope="module")
def tiny() -> Sizes:
    return Sizes(40, 8, 20, 1, 8, 1, probe_rows=8)


@pytest.fixture
def workspace(tiny: Sizes, tmp_path: Path) -> Workspace:
    small = [f"{stage}.batch_size=4" for stage in ("warmup", "bridge", "contrastive")]
    return Workspace(tmp_path / "work", tiny, "tiny", (*small, "contrastive.warmup_steps=0"))


# Scenes that differ in one attribute


def test_the_scenes_of_a_family_are_variations_of_the_first_in_one_attribute() -> None:
    def attributes(drawn: Scene) -> set[Any]:
        objects = {(number, each) for number, item in enumerate(drawn.objects) for each in vars(item).items()}
        return {drawn.background, *objects}

    drawn = list(islice(families(random.Random(0)), 10 * FAMILY))
    assert len(set(drawn)) == len(drawn)
    assert {split_of(scene) for scene in drawn} == {"held-out"}
    for start in range(0, len(drawn), FAMILY):
        first, *others = drawn[start : start + FAMILY]
        assert set(others) <= set(variations(first))
        same_places = [each for each in others if [o.place for o in each.objects] == [o.place for o in first.objects]]
        assert all(len(attributes(first) - attributes(other)) == 1 for other in same_places)
    found = variations(Scene("white", (SceneObject("small", "red", "ring", "top left"),)))
    # Three other backgrounds, one size, five colours, five shapes, three places.
    assert len(found) == len(set(found)) == 3 + 1 + 5 + 5 + 3


# What is compared


def test_contrastive_learning_alone_gets_the_compute_of_the_arm_that_it_is_compared_with(grid: Grid) -> None:
    compared = [(arm, other) for arm in grid.arms for other in grid.references(arm) if other.name == EQUAL]
    assert {arm.group for arm, _ in compared} == {"stages", "pairs", "length"}, "the premise"
    for arm, other in compared:
        nearest = grid.flops_per_step("contrastive", arm.fraction) / 2
        assert abs(grid.flops(arm) - grid.flops(other)) <= nearest, "as near as whole steps come"
    (captions,) = (arm for arm in grid.arms if arm.name == CAPTIONS_AS_PAIRS)
    (equal,) = (arm for arm in grid.arms if arm.group == "stages" and arm.name == EQUAL)
    assert grid.flops(captions) == pytest.approx(grid.flops(equal), rel=1e-2)
    assert {"contrastive.data.limit=8000", "contrastive.data.captions=captions"} <= set(captions.last.settings)


@pytest.mark.parametrize(("pairs", "rows"), [(100, 50), (64, 64), (63, 63), (1000, 62.5), (300, 60)])
def test_a_step_costs_what_its_rows_cost_also_where_an_epochs_last_batch_is_small(pairs: int, rows: float) -> None:
    sizes = replace(SIZES, pairs=pairs)
    assert grid_of(sizes).flops_per_step("contrastive", 1.0) == pytest.approx(rows * PER_ROW["contrastive"])
    # What the sampler of sentence-transformers makes of so many pairs, over an epoch.
    sampler = NoDuplicatesBatchSampler(
        Dataset.from_dict({"anchor": [str(number) for number in range(pairs)]}), batch_size=64, drop_last=False
    )
    assert np.mean([len(batch) for batch in sampler]) == rows


def test_arms_are_compared_with_those_that_differ_in_one_thing(grid: Grid) -> None:
    def names(group: str, name: str) -> list[list[str]]:
        arms = [arm for arm in grid.arms if (arm.group, arm.name) == (group, name)]
        return [[other.name for other in grid.references(arm)] for arm in arms]

    assert names("stages", ALL_THREE) == [[ALONE, EQUAL, NO_BRIDGE]]
    assert names("stages", MOCA_ARM) == [[ALONE, EQUAL, ALL_THREE]]
    assert names("stages", EQUAL) == names("stages", NO_BRIDGE) == [[ALONE]]
    assert names("variants", "all three, causal") == [[ALL_THREE]]
    assert names("stages", ALONE) == [[]]
    assert names("mask ratio", "mask ratio 0.9") == [["mask ratio 0.5"]]
    assert names("pairs", ALL_THREE) == [[ALONE, EQUAL]] * len(FRACTIONS)
    assert names("length", ALL_THREE) == [[EQUAL]] * 2 * len(LENGTHS)


def test_moca_is_compared_where_its_settings_fit(workspace: Workspace, grid: Grid) -> None:
    assert workspace.has_moca
    assert not replace(workspace, settings=("eos_tokens=2",)).has_moca, "a mean is one vector"
    assert not replace(workspace, base="own-folder", settings=()).has_moca
    for whole in (grid, photo_grid()):
        names = {arm.name for arm in whole.arms}
        costs = {name: each for name, each in whole.flops_per_row.items() if name != "moca"}
        assert {arm.name for arm in replace(whole, flops_per_row=costs).arms} == names - {MOCA_ARM} != names
    found = replace(workspace, settings=("eos_tokens=2", "contrastive.batch_size=4")).grid(["stages"])
    assert ALL_THREE in {arm.name for arm in found.arms}
    assert not found.has_moca


def test_variants_are_compared_after_equally_long_bridges() -> None:
    arms = [arm for arm in grid_of(replace(SIZES, variant_part=0.5)).arms if arm.group in ("variants", "mask ratio")]
    assert {steps for arm in arms for stage_run, steps in arm.chain if stage_run.stage == "bridge"} == {320}
    settings = {setting for arm in arms for stage_run, _ in arm.chain for setting in stage_run.settings}
    assert {"bridge.eos_attends_to_b=false", "bridge.mask_ratio=0.9"} <= settings
    (causal,) = (arm for arm in arms if arm.name == "all three, causal")
    assert [stage_run.stage for stage_run, _ in causal.chain] == ["warmup", "bridge", "contrastive"]
    assert all("bidirectional=false" in stage_run.settings for stage_run, _ in causal.chain)


def test_the_key_of_a_stage_depends_on_all_that_changes_its_weights(workspace: Workspace, tiny: Sizes) -> None:
    runs = {stage_run for arm in grid_of(tiny).arms for stage_run, _ in arm.chain}
    keys = {workspace.key(stage_run, 0) for stage_run in runs}
    assert len(keys) == len(runs)
    assert not keys & {workspace.key(stage_run, 1) for stage_run in runs}, "a seed has its own data"
    stage_run = StageRun("bridge", 4, start=StageRun("warmup", 2))
    before = workspace.key(stage_run, 0)
    machine = ("workers=3", "bridge.mini_batch_size=2", "bridge.adapter={kind: dora}")
    assert replace(workspace, settings=(*workspace.settings, *machine)).key(stage_run, 0) == before
    metadata = workspace.data(0).held_out / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("red", "crimson"))
    assert workspace.key(stage_run, 0) != before, "other data at the same place"


def test_only_contrastive_learning_alone_has_the_learning_rate_that_is_given_for_it(
    workspace: Workspace, tiny: Sizes
) -> None:
    changed = replace(workspace, alone_learning_rate=3e-3)
    lasts = {arm.last for arm in grid_of(tiny).arms}
    assert {each.start is None for each in lasts} == {True, False}, "the premise"
    for last in lasts:
        before, after = (each.recipe(last, 0, backbone=None).contrastive for each in (workspace, changed))
        assert before is not None
        assert before.learning_rate != 3e-3, "the premise"
        rate = before.learning_rate if last.start else 3e-3
        assert after == before.model_copy(update={"learning_rate": rate})


@pytest.mark.parametrize("is_given", [False, True], ids=["drawn", "given"])
def test_contrastive_pairs_are_not_among_the_rows_held_out_of_the_bridge(workspace: Workspace, is_given: bool) -> None:
    data = workspace.data(0)
    if is_given:
        data = replace(workspace, folders=UserFolders(data.training, data.held_out)).data(0)
    training, pairs = (read_image_folder(folder) for folder in (data.training, data.pairs))
    table = RowTable.of(training)
    probe_rows = table.select(hold_out_rows(table, workspace.sizes.probe_rows, seed=0)[0])
    own, probed = ({Path(str(row.image)).name for row in rows} for rows in (pairs, probe_rows))
    assert len(probed) == len(training) - len(pairs) == workspace.sizes.probe_rows
    assert not own & probed


def test_an_image_folders_lines_are_those_that_training_reads(workspace: Workspace, tmp_path: Path) -> None:
    """A caption may hold a line separator, and a file may begin with a byte order mark."""
    folder = write_captioned(tmp_path / "own", [[f"over\u2028two lines, {number}"] for number in range(6)])
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    data = replace(workspace, sizes=replace(workspace.sizes, probe_rows=2), folders=UserFolders(folder, folder)).data(0)
    linked, all_rows = (read_image_folder(each) for each in (data.pairs, folder))
    assert [row.positive for row in linked] == [row.positive for row in all_rows[2:]]


def test_the_users_folders_are_checked_before_anything_is_trained(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = workspace.data(0)

    def planned(*arguments: object) -> Workspace:
        given = ("ablation.py", "--work", tmp_path / "own", "--training", data.training, "--held-out", *arguments)
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        return ablation.open_workspace(ablation.parse())

    own = planned(data.held_out, "--pairs", 30)
    images = len(read_image_folder(data.training))
    assert (own.sizes.training, own.sizes.probe_rows, own.sizes.held_out) == (images - images // 4, images // 4, 8)
    with pytest.raises(UsageError, match=f"--pairs 37 is more than the {images - images // 4} images"):
        planned(data.held_out, "--pairs", 37)


@pytest.mark.parametrize("setting", ["seed=5", "bridge.snapshot_steps=[1]", "contrastive.steps=9"])
def test_settings_of_the_ablation_itself_are_refused(tmp_path: Path, tiny: Sizes, setting: str) -> None:
    with pytest.raises(UsageError, match=f"--set {re.escape(setting)}: the ablation sets"):
        Workspace(tmp_path, tiny, "tiny", (setting,))


# On photographs

PHOTOS = PhotoSizes(6000, 1000, 6000, 80, 320, 50, images=(1000, 100, 9000), captions=5)


def photo_grid(sizes: PhotoSizes = PHOTOS) -> PhotoGrid:
    batches = {**BATCH_SIZES, "contrastive": 128}
    return PhotoGrid(sizes, {**PER_ROW, SETTINGS[0]: 0.3, SETTINGS[-1]: 0.7}, batches, mask_ratio=0.7)


def test_all_arms_on_the_same_photographs_have_the_same_compute_but_for_those_that_are_to_have_less() -> None:
    grid = photo_grid()
    for arm in grid.arms:
        equal = [other for other in grid.references(arm) if other.name == EQUAL]
        assert len(equal) == (arm.name not in (ALONE, EQUAL))
        is_compared = arm.name in (HALF, MOCA_ARM) or (arm.group == "settings" and arm.name not in FIRST)
        assert is_compared == (ALL_THREE in {other.name for other in grid.references(arm)}), arm.name
        if equal and arm.name not in ("twice the bridge", NO_BRIDGE, BRIDGE_ONLY, NO_PAIRS):
            slack = sum(grid.flops_per_step(stage, arm.fraction, arm.captions) for stage in BATCH_SIZES) / 2
            assert abs(grid.flops(arm) - grid.flops(equal[0])) <= slack, arm.name
    varied = {arm.name: arm.chain for arm in grid.arms if arm.name in (SETTINGS[0], SETTINGS[-1])}
    assert varied[SETTINGS[0]][1][1] == round(320 * 0.34 / 0.3), "cheaper rows: more steps"
    assert varied[SETTINGS[-1]][2][1] == round(50 * 0.35 / 0.7), "rows of twice the cost: half the steps"


def test_the_main_comparison_comes_first_with_all_photographs() -> None:
    grid = photo_grid()
    arms = [arm for arm in grid.arms if arm.group == "photographs"]
    data = [(1000, 5), (100, 5), (6000, 5), (1000, 1), (100, 1), (6000, 1)]
    expected = [(*each, name) for each in data for name in (ALONE, EQUAL, ALL_THREE)]
    assert [(grid.pairs(arm.fraction), arm.captions, arm.name) for arm in arms[: len(expected)]] == expected
    later = {(arm.name, grid.pairs(arm.fraction), arm.captions) for arm in arms[len(expected) :]}
    once = (NO_BRIDGE, BRIDGE_ONLY, HALF, MOCA_ARM, NO_PAIRS, ONLY_PAIRS)
    assert later == {*((name, 1000, 5) for name in once), (ONLY_PAIRS, 100, 5)}
    complete = [arm.name for arm in photo_grid(replace(PHOTOS, complete=True)).arms if arm.group == "photographs"]
    assert [complete.count(name) for name in (NO_BRIDGE, ONLY_PAIRS)] == [6, 5], (
        "with all photographs the pairs are all"
    )
    chosen = replace(grid, patterns=("all three, 100 images*",)).arms
    assert [(arm.name, arm.captions) for arm in chosen] == [(ALL_THREE, 5), (ALL_THREE, 1)]


def test_the_stages_on_the_pairs_alone_read_no_other_images_or_captions(workspace: Workspace) -> None:
    drawn = workspace.data(0)
    own = replace(workspace, base="photos", folders=UserFolders(drawn.training, drawn.held_out), settings=())
    sizes = replace(PHOTOS, training=48, pairs=48, images=(12, 48), complete=True, captions=4, probe_rows=4)
    own = replace(own, sizes=sizes)
    for captions in (4, 1):
        (arm,) = (
            arm
            for arm in photo_grid(sizes).arms
            if (arm.name, arm.captions, arm.fraction) == (ONLY_PAIRS, captions, 0.25)
        )
        found = []
        for stage_run, _ in arm.chain:
            recipe = own.recipe(stage_run, 3, backbone=None)
            table = read_rows(recipe.sources_of(stage_run.stage), on_bad_row="stop", seed=3).rows
            sides = [(row.image, row.query.text, row.positive.text) for row in table]
            pictured = {(image, text) for image, _, text in sides if image is not None}
            texts = {text for _, one, text in sides} | {one for _, one, _ in sides} - {None}
            assert texts == {text for _, text in pictured}
            found.append(pictured)
        assert found[0] == found[1] == found[2]
        assert (len({image for image, _ in found[0]}), len(found[0])) == (12, 12 * captions)


def test_a_model_is_scored_image_by_image_as_eval_scores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_captioned(tmp_path / "own", [["red ring", "a ring"], ["blue dot"], ["dot", "green dot", "spot"]])
    model = Encoder(ScoredModel(), "scored")
    monkeypatch.setattr("arms.runner.load_encoder", lambda checkpoint: model)
    found = score(tmp_path, folder, "captions")
    expected = evaluate_pairs([model], read_pairs(folder), resamples=10)["subsets"]
    images = np.array(found["images"])
    assert images.shape == (3, 2, 4)
    assert images[:, 1].mean(axis=0) == pytest.approx([expected["image_to_text"][f"hit@{k}"] for k in (1, 5, 10)]
                                                      + [expected["image_to_text"]["mrr"]])  # fmt: skip
    weights = np.array([2, 1, 3]) / 6
    assert weights @ images[:, 0, 0] == pytest.approx(expected["text_to_image"]["hit@1"])
    assert found["metrics"]["text_to_image"]["recall@1"] == pytest.approx(images[:, 0, 0].mean())


def test_finished_arms_are_compared_over_the_seeds_they_have_and_over_images() -> None:
    grid = replace(photo_grid(), groups=("photographs",), patterns=("*, 100 images, 5*",))
    generator = np.random.default_rng(0)

    def outcome(seed: int, gain: float) -> dict[str, Any]:
        images = np.clip(generator.random((40, 2, 4)) * 0.1 + gain, 0, 1)
        ways = dict(zip(("text_to_image", "image_to_text"), images.mean(axis=0).tolist(), strict=True))
        metrics = {way: dict(zip(SCORED, row, strict=True)) for way, row in ways.items()}
        means = {name: np.mean([each[name] for each in metrics.values()]) for name in SCORED}
        return {"seed": seed, **means, "directions": metrics, "seconds": 60.0, "bridge": {}, "images": images.tolist()}

    gains = {ALONE: 0.1, EQUAL: 0.2, ALL_THREE: 0.5}
    outcomes = [
        [outcome(seed, gains[arm.name]) if seed == 0 or arm.name != EQUAL else None for seed in (0, 1)]
        if arm.name in gains
        else [None, None]
        for arm in grid.arms
    ]
    document = {"seeds": [0, 1], "processes": 1, "data": [], **results_document(grid, outcomes)}
    assert [arm["name"] for arm in document["arms"]] == list(gains), "the others are not finished"
    ours = document["arms"][2]
    assert ours["differences"][ALONE]["half_width"] is not None
    assert ours["differences"][EQUAL]["half_width"] is None, "one seed in common"
    low, high = ours["difference_intervals"][EQUAL]
    assert 0.28 < low < ours["differences"][EQUAL]["mean"] < high < 0.32
    mean, (low, high) = ours["scores"]["image_to_text"]["recall@5"]
    assert low < mean < high
    (table,) = tables(document)
    assert ["1" if row[0] == EQUAL else "2" for row in table.rows] == [row[3] for row in table.rows]
    assert {axes.get_title() for axes in draw(document).axes} == {"5 captions an image"}


# Means, intervals, tables and the figure


def test_a_difference_to_another_arm_is_the_mean_of_the_differences_seed_by_seed(grid: Grid) -> None:
    outcomes = [
        [{"seed": seed, "recall@1": value} for seed, value in enumerate(np.random.default_rng(number).random(3))]
        for number in range(len(grid.arms))
    ]
    (ours,) = (number for number, arm in enumerate(grid.arms) if (arm.group, arm.name) == ("stages", ALL_THREE))
    document = results_document(grid, outcomes)["arms"]
    (alone,) = (number for number, arm in enumerate(document) if (arm["group"], arm["name"]) == ("stages", ALONE))
    differences = np.subtract(*(values(document[number]) for number in (ours, alone)))
    found = document[ours]["differences"][ALONE]
    assert found["mean"] == pytest.approx(differences.mean())
    # The 97.5 % quantile of t with 2 degrees of freedom is 4.302653.
    assert found["half_width"] == pytest.approx(4.302653 * differences.std(ddof=1) / 3**0.5)


def test_the_figure_has_the_numbers_of_the_results() -> None:
    document = json.loads((ROOT / "docs" / "ablation" / "ablation.json").read_text(encoding="utf-8"))
    panels = {axes.get_title(): axes for axes in draw(document).axes}

    def of(group: str, name: str, pairs: int | None = None) -> list[dict[str, Any]]:
        arms = [arm for arm in document["arms"] if (arm["group"], arm["name"]) == (group, name)]
        return [arm for arm in arms if pairs in (None, arm["pairs"])]

    stages = [np.mean(values(arm)) for arm in document["arms"] if arm["group"] == "stages"]
    assert [bar.get_width() for bar in reversed(panels["The stages, 1000 pairs"].patches)] == pytest.approx(stages)
    lengths = "{} pairs: a longer bridge, or contrastive steps".format
    for title, arms in (
        (lengths(100), of("length", ALL_THREE, 100)),
        (lengths(1000), of("length", EQUAL, 1000)),
        ("Fewer pairs", of("pairs", ALL_THREE)),
    ):
        (line,) = (line for line in panels[title].containers if line.get_label() == arms[0]["name"])
        x = (arm["pairs"] if title == "Fewer pairs" else arm["flops"] / 1e12 for arm in arms)
        expected = sorted(zip(x, (np.mean(values(arm)) for arm in arms), strict=True))
        np.testing.assert_allclose(line.lines[0].get_xydata(), expected)
        widths = [np.ptp(segment[:, 1]) / 2 for segment in line.lines[2][0].get_segments()]
        assert sorted(widths) == pytest.approx(sorted(arm["recall@1"]["half_width"] for arm in arms))


@pytest.mark.parametrize("name", ["ablation", "ablation/longer-bridge", "photos", "photos/second-backbone"])
def test_the_documented_tables_are_those_of_the_documented_numbers(name: str) -> None:
    folder = ROOT / "docs" / name
    document = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    assert len(document["seeds"]) >= 3
    assert (folder / "ablation.md").read_text(encoding="utf-8") == to_markdown(ablation.TITLE, tables(document))


# Running it


@pytest.mark.slow
def test_an_interrupted_ablation_trains_each_stage_once_and_scores_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [("length", 1.0, ALL_THREE, length) for length in (0.25, 1.0)]
    arms = [arm for arm in workspace.grid().arms if (arm.group, arm.fraction, arm.name, arm.x) in wanted]
    jobs = jobs_of(workspace, arms, [0])
    assert [job.stage for job in jobs.values()].count("contrastive") == 2, "the premise"

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in workspace.work.rglob("*.safetensors")}

    first = next(iter(jobs))
    run_jobs({first: jobs[first]}, processes=1, threads=1)
    before = written()

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("arms.runner.wait", interrupt)
        with pytest.raises(CocoaError, match="interrupted; finished stages stay"):
            run_jobs(jobs, processes=1, threads=1)
    run_jobs(jobs, processes=1, threads=1)
    after = written()
    assert before.items() < after.items()
    run_jobs(jobs, processes=1, threads=1)
    assert after == written()

    found = outcome(workspace, arms[0], 0)
    assert found is not None
    assert 0 <= found["recall@1"] <= found["mrr"] <= 1
    assert found["bridge"].keys() >= {"loss", "accuracy_matching_image", "accuracy_shuffled_image", "accuracy_no_image"}
