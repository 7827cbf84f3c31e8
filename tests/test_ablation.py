"""The ablation compares what it says: equal compute, weights that are kept, and a figure of the numbers in its file."""

import json
import random
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from arms.families import FAMILY, families, variations
from arms.figure import draw
from arms.grid import (
    ALL_THREE,
    ALONE,
    CAPTIONS_AS_PAIRS,
    EQUAL,
    LENGTHS,
    MASK_RATIOS,
    SHARES,
    Grid,
    Sizes,
    StageRun,
)
from arms.runner import Laboratory, jobs_of, outcome, read_scores, run_jobs
from arms.summary import arm_document, estimate, tables
from cocoa_embed.demo.scenes import Scene, SceneObject, split_of
from cocoa_embed.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.pairs import evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.export import build_sentence_transformer

PER_STEP = {"warmup": 13.0, "bridge": 11.0, "contrastive": 22.0}
SIZES = Sizes(8000, 500, 1000, warmup_steps=200, bridge_steps=640, contrastive_steps=50)


@pytest.fixture
def grid() -> Grid:
    return Grid(SIZES, PER_STEP)


# Scenes that are hard to tell apart


def features(scene: Scene) -> list[Any]:
    """The background, and for each place what is there."""
    there = {item.place: (item.size, item.colour, item.shape) for item in scene.objects}
    return [scene.background, there]


def test_the_scenes_of_a_family_differ_from_the_first_in_one_thing() -> None:
    drawn = list(islice(families(random.Random(0)), 10 * FAMILY))
    assert len(set(drawn)) == len(drawn)
    assert all(split_of(scene) == "held-out" for scene in drawn)
    for start in range(0, len(drawn), FAMILY):
        first, *others = drawn[start : start + FAMILY]
        for other in others:
            assert other in variations(first)
            assert len(first.objects) == len(other.objects)
            (ground, there), (other_ground, other_there) = features(first), features(other)
            if ground != other_ground:
                assert there == other_there
            elif there.keys() != other_there.keys():
                assert sorted(there.values()) == sorted(other_there.values()), "one thing has moved"
            else:
                changed = [place for place in there if there[place] != other_there[place]]
                assert len(changed) == 1
                assert sum(a != b for a, b in zip(there[changed[0]], other_there[changed[0]], strict=True)) == 1


def test_every_change_of_one_thing_is_a_variation() -> None:
    scene = Scene("white", (SceneObject("small", "red", "ring", "top left"),))
    # Three other backgrounds, one size, five colours, five shapes, three places.
    assert len(variations(scene)) == len(set(variations(scene))) == 3 + 1 + 5 + 5 + 3


# What is compared


def test_contrastive_learning_alone_gets_the_compute_of_all_three(grid: Grid) -> None:
    for group in ("stages", "pairs", "length"):
        pairs = {(arm.share, arm.x, arm.name): arm.flops(PER_STEP) for arm in grid.arms if arm.group == group}
        compared = [key for key in pairs if key[2] == EQUAL]
        assert compared
        for share, x, _ in compared:
            difference = pairs[share, x, EQUAL] - pairs[share, x, ALL_THREE]
            assert abs(difference) <= PER_STEP["contrastive"] / 2, "as near as whole steps come"


def test_every_captioned_image_as_a_pair_gets_no_more_compute(grid: Grid) -> None:
    (captions,) = (arm for arm in grid.arms if arm.name == CAPTIONS_AS_PAIRS)
    (equal,) = (arm for arm in grid.arms if arm.group == "stages" and arm.name == EQUAL)
    assert captions.flops(PER_STEP) == equal.flops(PER_STEP)
    assert "contrastive.data.limit=8000" in captions.last.settings


def test_weights_that_are_scored_or_started_from_on_the_way_are_kept(grid: Grid) -> None:
    def kept(stage_run: StageRun) -> list[int]:
        settings = dict(setting.split("=") for setting in stage_run.settings)
        return json.loads(settings.get(f"{stage_run.stage}.keep_steps", "[]"))

    scored = [(arm.last, arm.at_step) for arm in grid.arms if arm.at_step is not None]
    started = [(arm.last.start, arm.last.at_step) for arm in grid.arms if arm.last.at_step is not None]
    assert scored
    assert started
    for stage_run, step in [*scored, *started]:
        assert stage_run is not None
        assert step in kept(stage_run)
        assert step < stage_run.steps


def test_the_arms_are_those_that_were_asked_for(grid: Grid) -> None:
    def of(group: str) -> list[tuple[str, float, float | None]]:
        return [(arm.name, arm.share, arm.x) for arm in grid.arms if arm.group == group]

    assert [name for name, *_ in of("stages")] == [
        ALONE,
        EQUAL,
        "warm-up, contrastive",
        "bridge, contrastive",
        ALL_THREE,
    ]
    assert [x for *_, x in of("mask ratio")] == list(MASK_RATIOS) == [0.3, 0.5, 0.7, 0.9]
    assert {share for name, share, _ in of("pairs") if name == ALL_THREE} == set(SHARES) == {0.1, 0.3, 1.0}
    assert [x for name, share, x in of("length") if name == ALL_THREE and share == 0.1] == list(LENGTHS)


@pytest.mark.parametrize("part", LENGTHS)
def test_variants_of_the_bridge_are_compared_after_as_many_steps(part: float) -> None:
    arms = [
        arm
        for arm in Grid(replace(SIZES, compared_part=part), PER_STEP).arms
        if arm.group in ("variants", "mask ratio")
    ]
    lengths = {steps for arm in arms for stage_run, steps in arm.steps() if stage_run.stage == "bridge"}
    assert lengths == {round(640 * part)}
    settings = [setting for arm in arms for stage_run, _ in arm.steps() for setting in stage_run.settings]
    assert {"bidirectional=false", "bridge.eos_attends_to_b=false", "bridge.mask_ratio=0.9"} <= set(settings)


def test_a_causal_arm_is_causal_in_every_stage(grid: Grid) -> None:
    (arm,) = (arm for arm in grid.arms if arm.name == "all three, causal")
    assert [stage_run.stage for stage_run, _ in arm.steps()] == ["warmup", "bridge", "contrastive"]
    assert all("bidirectional=false" in stage_run.settings for stage_run, _ in arm.steps())


def test_stages_are_shared_only_where_all_that_leads_to_them_is_the_same(grid: Grid, tmp_path: Path) -> None:
    place = Laboratory(tmp_path, SIZES)
    runs = {arm.last for arm in grid.arms} | {stage_run for arm in grid.arms for stage_run, _ in arm.steps()}
    assert len({place.key(stage_run) for stage_run in runs}) == len(runs)
    other = Laboratory(tmp_path, replace(SIZES, settings=("warmup.batch_size=8",)))
    assert not {place.key(stage_run) for stage_run in runs} & {other.key(stage_run) for stage_run in runs}


# Means and intervals


def test_an_interval_is_students() -> None:
    # Of 1, 2, 3: standard deviation 1, and the 97.5 % quantile of t with 2 degrees of freedom is 4.302653.
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert estimate([0.5]) == (0.5, None)


def results(grid: Grid, seeds: int = 3) -> dict[str, Any]:
    """A results' file of numbers drawn at random."""
    generator = np.random.default_rng(0)

    def outcome_of(seed: int) -> dict[str, Any]:
        bridge = {name: generator.random() for name in ("loss", "accuracy_right_image", "accuracy_shuffled_image")}
        figures = {name: generator.random() for name in ("recall@1", "mrr", "seconds")}
        return {"seed": seed, "directions": {}, "bridge": bridge, **figures}

    arms = [arm_document(grid, arm, [outcome_of(seed) for seed in range(seeds)]) for arm in grid.arms]
    return {"sizes": {"pairs": 1000}, "seeds": list(range(seeds)), "arms": arms}


def by_title(document: dict[str, Any]) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in draw(document).axes}


def test_the_figure_shows_the_numbers_of_the_file(grid: Grid) -> None:
    document = results(grid)
    panels = by_title(document)
    stages = [arm for arm in document["arms"] if arm["group"] == "stages"]
    bars = panels["The stages, all pairs"].patches
    means = [np.mean([outcome["recall@1"] for outcome in arm["seeds"]]) for arm in reversed(stages)]
    assert [bar.get_width() for bar in bars] == pytest.approx(means)

    few = next(axes for title, axes in panels.items() if title.endswith("100 pairs"))
    lines = {container.get_label(): container for container in few.containers}
    for name in (ALL_THREE, EQUAL):
        arms = [
            arm
            for arm in document["arms"]
            if (arm["group"], arm["name"], arm["share_of_pairs"]) == ("length", name, 0.1)
        ]
        expected = sorted((arm["flops"] / 1e12, arm["recall@1"]["mean"]) for arm in arms)
        drawn = lines[name].lines[0].get_xydata()
        assert drawn.ravel() == pytest.approx(np.array(expected).ravel())


def test_the_tables_show_the_numbers_of_the_file(grid: Grid) -> None:
    document = results(grid)
    stages = next(table for table in tables(document) if table.title == "The stages")
    arms = {arm["name"]: arm for arm in document["arms"] if arm["group"] == "stages"}
    assert len(stages.rows) == len(arms)
    for row in stages.rows:
        cells = dict(zip(stages.header, row, strict=True))
        recall = [outcome["recall@1"] for outcome in arms[cells["arm"]]["seeds"]]
        alone = [outcome["recall@1"] for outcome in arms[ALONE]["seeds"]]
        assert cells["recall@1"].startswith(f"{np.mean(recall):.3f} ± ")
        if cells["arm"] != ALONE:
            assert cells["against contrastive only"].startswith(f"{np.mean(recall) - np.mean(alone):+.3f} ± ")


# Running it


@pytest.fixture(scope="module")
def tiny() -> Sizes:
    small = [f"{stage}.batch_size=4" for stage in ("warmup", "bridge", "contrastive")]
    return Sizes(40, 8, 20, 1, 8, 1, settings=(*small, "bridge.probe_rows=4", "contrastive.warmup_steps=0"))


@pytest.mark.slow
def test_arms_are_trained_once_and_scored_as_eval_pairs_would(tiny: Sizes, tmp_path: Path) -> None:
    place = Laboratory(tmp_path / "work", tiny)
    place.open()
    grid = Grid(tiny, place.flops_per_step())
    arms = [arm for arm in grid.arms if arm.group == "length" and arm.share == 1.0]
    jobs = jobs_of(place, arms, [0])
    run_jobs(jobs, processes=1, threads=1)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    run_jobs(jobs, processes=1, threads=1)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}

    arm = next(arm for arm in arms if arm.name == ALL_THREE and arm.x == 0.25)
    found = outcome(place, arm, 0)
    checkpoint = place.folder(arm.last, 0) / "contrastive"
    encoder = Encoder(build_sentence_transformer(checkpoint, prompts={}), "checked")
    again = evaluate_pairs([encoder], read_pairs(place.data(0).held_out), resamples=10)
    assert found["recall@1"] == pytest.approx(again["averages"]["recall@1"])
    assert found["bridge"].keys() >= {"loss", "accuracy_right_image", "accuracy_shuffled_image", "accuracy_no_image"}
    assert arm_document(grid, arm, [found])["recall@1"]["half_width"] is None


@pytest.mark.slow
def test_a_run_that_is_ended_goes_on_where_it_was(tiny: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Laboratory(tmp_path / "work", tiny)
    place.open()
    grid = Grid(tiny, PER_STEP)
    arm = next(arm for arm in grid.arms if arm.name == "warm-up, contrastive")
    jobs = jobs_of(place, [arm], [0])
    first, last = jobs
    run_jobs({first: jobs[first]}, processes=1, threads=1)
    trained = (first / "warmup" / "model.safetensors").stat().st_mtime_ns

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("arms.runner.wait", interrupt)
        with pytest.raises(CocoaError, match="interrupted; 0 of 2 stages are finished, the same command goes on"):
            run_jobs(jobs, processes=1, threads=1)
    run_jobs(jobs, processes=1, threads=1)
    assert (first / "warmup" / "model.safetensors").stat().st_mtime_ns == trained
    assert read_scores(last).keys() == {"end"}


def test_a_folder_to_train_on_without_one_to_measure_on_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ablation

    monkeypatch.setattr(sys, "argv", ["ablation.py", "--training", "mine"])
    with pytest.raises(SystemExit) as ended:
        ablation.parse()
    assert ended.value.code == 2
    assert "--training and --held-out go together" in capsys.readouterr().err
