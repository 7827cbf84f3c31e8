"""The ablation compares what it says: equal compute, weights that are kept, and a figure of the numbers in its file."""

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
from matplotlib.axes import Axes
from PIL import Image
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

import ablation
from arms.families import FAMILY, families, variations
from arms.figure import draw, figure_svg
from arms.grid import (
    ALL_THREE,
    ALONE,
    CAPTIONS_AS_PAIRS,
    EQUAL,
    LENGTHS,
    MASK_RATIOS,
    NO_BRIDGE,
    SHARES,
    Grid,
    Sizes,
    StageRun,
)
from arms.place import Given, Place
from arms.runner import jobs_of, outcome, read_scores, run_jobs
from arms.summary import estimate, results_document, tables
from cocoa_embed.demo.scenes import Scene, SceneObject, split_of
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation.pairs import evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.report.tables import to_markdown
from cocoa_embed.train.data.rows import read_image_folder
from cocoa_embed.train.stages.probe import hold_out_rows

PER_ROW = {"warmup": 0.42, "bridge": 0.34, "contrastive": 0.35}
BATCH_SIZES = {"warmup": 32, "bridge": 32, "contrastive": 64}
SIZES = Sizes(8000, 500, 1000, warmup_steps=200, bridge_steps=640, contrastive_steps=50)


def grid_of(sizes: Sizes) -> Grid:
    return Grid(sizes, PER_ROW, BATCH_SIZES, mask_ratio=0.5)


@pytest.fixture
def grid() -> Grid:
    return grid_of(SIZES)


@pytest.fixture(scope="module")
def tiny() -> Sizes:
    return Sizes(40, 8, 20, 1, 8, 1, kept_out=8)


@pytest.fixture
def place(tiny: Sizes, tmp_path: Path) -> Place:
    small = [f"{stage}.batch_size=4" for stage in ("warmup", "bridge", "contrastive")]
    return Place(tmp_path / "work", tiny, "tiny", (*small, "contrastive.warmup_steps=0"))


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
        flops = {(arm.share, arm.x, arm.name): grid.flops(arm) for arm in grid.arms if arm.group == group}
        compared = [key for key in flops if key[2] == EQUAL]
        assert compared
        for share, x, _ in compared:
            difference = flops[share, x, EQUAL] - flops[share, x, ALL_THREE]
            assert abs(difference) <= grid.flops_per_step("contrastive", share) / 2, "as near as whole steps come"


@pytest.mark.parametrize(("pairs", "rows"), [(100, 50), (64, 64), (63, 63), (1000, 62.5), (300, 60)])
def test_a_step_costs_what_its_rows_cost_also_where_an_epochs_last_batch_is_small(pairs: int, rows: float) -> None:
    sizes = replace(SIZES, pairs=pairs)
    assert grid_of(sizes).flops_per_step("contrastive", 1.0) == pytest.approx(rows * PER_ROW["contrastive"])
    # What the sampler of sentence-transformers makes of so many pairs, over an epoch.
    sampler = NoDuplicatesBatchSampler(
        Dataset.from_dict({"anchor": [str(number) for number in range(pairs)]}), batch_size=64, drop_last=False
    )
    assert np.mean([len(batch) for batch in sampler]) == rows


def test_every_captioned_image_as_a_pair_gets_as_much_compute_and_every_wording(grid: Grid) -> None:
    (captions,) = (arm for arm in grid.arms if arm.name == CAPTIONS_AS_PAIRS)
    (equal,) = (arm for arm in grid.arms if arm.group == "stages" and arm.name == EQUAL)
    assert grid.flops(captions) == pytest.approx(grid.flops(equal), rel=1e-2)
    assert {"contrastive.data.limit=8000", "contrastive.data.captions=captions"} <= set(captions.last.settings)


def test_arms_are_held_against_those_that_differ_in_one_thing(grid: Grid) -> None:
    def names(group: str, name: str) -> list[list[str]]:
        return [
            [other.name for other in grid.references(arm)]
            for arm in grid.arms
            if (arm.group, arm.name) == (group, name)
        ]

    assert names("stages", ALL_THREE) == [[ALONE, EQUAL, NO_BRIDGE]]
    assert names("stages", EQUAL) == names("stages", NO_BRIDGE) == names("stages", "bridge, contrastive") == [[ALONE]]
    assert names("variants", "all three, causal") == [[ALL_THREE]]
    assert names("variants", "contrastive only, causal") == [[ALONE]]
    assert names("stages", ALONE) == names("variants", ALONE) == names("variants", ALL_THREE) == [[]]
    assert names("mask ratio", "mask ratio 0.9") == [["mask ratio 0.5"]]
    assert names("pairs", ALL_THREE) == [[ALONE, EQUAL]] * len(SHARES)
    assert names("length", ALL_THREE) == [[EQUAL]] * 2 * len(LENGTHS)


def test_only_arms_of_the_same_compute_are_held_against_contrastive_learning_with_all_of_it(grid: Grid) -> None:
    compared = [(arm, other) for arm in grid.arms for other in grid.references(arm) if other.name == EQUAL]
    assert {arm.group for arm, _ in compared} == {"stages", "pairs", "length"}, "the premise"
    for arm, other in compared:
        assert grid.flops(arm) == pytest.approx(grid.flops(other), rel=0.01)


def test_weights_that_are_scored_or_started_from_on_the_way_are_kept(grid: Grid) -> None:
    def kept(stage_run: StageRun) -> list[int]:
        settings = dict(setting.split("=") for setting in stage_run.settings)
        return json.loads(settings.get(f"{stage_run.stage}.snapshot_steps", "[]"))

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
    arms = [arm for arm in grid_of(replace(SIZES, compared_part=part)).arms if arm.group in ("variants", "mask ratio")]
    lengths = {steps for arm in arms for stage_run, steps in arm.steps() if stage_run.stage == "bridge"}
    assert lengths == {round(640 * part)}
    settings = [setting for arm in arms for stage_run, _ in arm.steps() for setting in stage_run.settings]
    assert {"bidirectional=false", "bridge.eos_attends_to_b=false", "bridge.mask_ratio=0.9"} <= set(settings)


def test_a_causal_arm_is_causal_in_every_stage(grid: Grid) -> None:
    (arm,) = (arm for arm in grid.arms if arm.name == "all three, causal")
    assert [stage_run.stage for stage_run, _ in arm.steps()] == ["warmup", "bridge", "contrastive"]
    assert all("bidirectional=false" in stage_run.settings for stage_run, _ in arm.steps())


def test_stages_are_shared_only_where_all_that_leads_to_them_is_the_same(place: Place, tiny: Sizes) -> None:
    runs = {stage_run for arm in grid_of(tiny).arms for stage_run, _ in arm.steps()}
    keys = {place.key(stage_run, 0) for stage_run in runs}
    assert len(keys) == len(runs)
    assert not keys & {place.key(stage_run, 1) for stage_run in runs}, "a seed has its own data"
    other = replace(place, settings=(*place.settings, "warmup.learning_rate=0.5", "contrastive.temperature=0.5"))
    shared = keys & {other.key(stage_run, 0) for stage_run in runs}
    assert all(key.startswith("bridge") for key in shared), "those that start from the backbone"


def test_other_data_at_the_same_place_are_trained_and_scored_anew(place: Place) -> None:
    stage_run = StageRun("contrastive", 1)
    before = place.key(stage_run, 0)
    metadata = place.data(0).held_out / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("red", "crimson"))
    assert place.key(stage_run, 0) != before


@pytest.mark.parametrize("is_given", [False, True], ids=["drawn", "given"])
def test_contrastive_pairs_are_none_of_the_rows_that_the_bridge_keeps_out(place: Place, is_given: bool) -> None:
    data = place.data(0)
    if is_given:
        place = replace(place, given=Given(data.training, data.held_out))
        data = place.data(0)
    training, pairs = (read_image_folder(folder) for folder in (data.training, data.pairs))
    kept_out, _ = hold_out_rows(training, place.sizes.kept_out)
    assert len(kept_out) == place.sizes.kept_out
    assert len(pairs) == len(training) - place.sizes.kept_out
    own = {Path(str(row.image)).name for row in pairs}
    assert not own & {Path(str(row.image)).name for row in kept_out}


def test_an_image_folders_lines_are_those_that_training_reads(place: Place, tmp_path: Path) -> None:
    """A caption may hold a line separator, and a file may begin with a byte order mark."""
    folder = tmp_path / "own"
    folder.mkdir()
    lines = []
    for number in range(6):
        Image.new("RGB", (28, 28)).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": f"over\u2028two lines, {number}"}
        lines.append(json.dumps(row, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    sizes = replace(place.sizes, kept_out=2)
    data = replace(place, sizes=sizes, given=Given(folder, folder)).data(0)
    assert [row.positive for row in read_image_folder(data.pairs)] == [
        row.positive for row in read_image_folder(folder)[2:]
    ]


def test_what_differs_between_machines_trains_nothing_anew(place: Place) -> None:
    stage_run = StageRun("bridge", 4, start=StageRun("warmup", 2))
    other = replace(place, settings=(*place.settings, "workers=3", "bridge.mini_batch_size=2"))
    assert other.key(stage_run, 0) == place.key(stage_run, 0)


def test_a_recipes_adapters_are_left_out(place: Place) -> None:
    adapted = replace(place, settings=(*place.settings, "bridge.adapter={kind: dora}"))
    recipe = adapted.recipe(StageRun("bridge", 8, ("bridge.snapshot_steps=[2]",)), 0, backbone=None)
    assert recipe.bridge is not None
    assert recipe.bridge.adapter is None


def test_the_users_folders_are_checked_before_anything_is_trained(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = place.data(0)

    def planned(*arguments: object) -> Place:
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--work", str(tmp_path / "own"), *map(str, arguments)])
        return ablation.place_of(ablation.parse())

    own = planned("--training", data.training, "--held-out", data.held_out, "--pairs", 30)
    images = len(read_image_folder(data.training))
    assert (own.sizes.training, own.sizes.kept_out, own.sizes.held_out) == (images - images // 4, images // 4, 8)
    with pytest.raises(UsageError, match=f"--pairs 37 are more than the {images - images // 4} images"):
        planned("--training", data.training, "--held-out", data.held_out, "--pairs", 37)
    with pytest.raises(UsageError, match="are both"):
        planned("--training", data.training, "--held-out", data.training)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UsageError, match=r"table has no metadata\.jsonl"):
        planned("--training", data.training, "--held-out", tmp_path / "table")


@pytest.mark.parametrize(
    "setting",
    ["seed=5", "data.folder=x", "bridge.snapshot_steps=[1]", "contrastive.steps=9", "warmup.group_by_length=true"],
)
def test_what_the_ablation_sets_itself_is_refused(tmp_path: Path, tiny: Sizes, setting: str) -> None:
    with pytest.raises(UsageError, match=f"--set {re.escape(setting)}: the ablation sets"):
        Place(tmp_path, tiny, "tiny", (setting,))


def test_two_ablations_do_not_work_in_one_folder(tmp_path: Path, tiny: Sizes) -> None:
    first, second = Place(tmp_path, tiny, "tiny"), Place(tmp_path, tiny, "tiny")
    with first.open():
        with pytest.raises(CocoaError, match="another ablation is at work"), second.open():
            pass
    with second.open():
        pass


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
        bridge = {name: generator.random() for name in ("loss", "accuracy_matching_image", "accuracy_shuffled_image")}
        figures = {name: generator.random() for name in ("recall@1", "mrr", "seconds")}
        return {"seed": seed, "directions": {}, "bridge": bridge, **figures}

    outcomes = [[outcome_of(seed) for seed in range(seeds)] for _ in grid.arms]
    return {"seeds": list(range(seeds)), "processes": 2, "data": "drawn", **results_document(grid, outcomes)}


def by_title(document: dict[str, Any]) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in draw(document).axes}


def test_bars_are_the_numbers_of_the_file(grid: Grid) -> None:
    document = results(grid)
    stages = [arm for arm in document["arms"] if arm["group"] == "stages"]
    axes = by_title(document)["The stages, 1000 pairs"]
    for bar, line, arm in zip(axes.patches, axes.containers[1::2], reversed(stages), strict=True):
        seeds = [outcome["recall@1"] for outcome in arm["outcomes"]]
        assert bar.get_width() == pytest.approx(np.mean(seeds))
        ((left, _), (right, _)) = line.lines[2][0].get_segments()[0]
        assert (right - left) / 2 == pytest.approx(arm["recall@1"]["half_width"])


@pytest.mark.parametrize(
    ("title", "group", "pairs", "name", "x"),
    [
        ("100 pairs: a longer bridge, or contrastive steps", "length", 100, ALL_THREE, "flops"),
        ("100 pairs: a longer bridge, or contrastive steps", "length", 100, EQUAL, "flops"),
        ("1000 pairs: a longer bridge, or contrastive steps", "length", 1000, EQUAL, "flops"),
        ("Fewer pairs", "pairs", None, ALL_THREE, "pairs"),
        ("Fewer pairs", "pairs", None, CAPTIONS_AS_PAIRS, "pairs"),
    ],
)
def test_lines_are_the_numbers_of_the_file(
    grid: Grid, title: str, group: str, pairs: int | None, name: str, x: str
) -> None:
    document = results(grid)
    arms = [arm for arm in document["arms"] if arm["group"] == group and arm["name"] == name]
    arms = sorted((arm for arm in arms if pairs in (None, arm["pairs"])), key=lambda arm: arm[x])
    assert arms
    (drawn,) = (line for line in by_title(document)[title].containers if line.get_label() == name)
    scale = 1e12 if x == "flops" else 1
    expected = [(arm[x] / scale, np.mean([outcome["recall@1"] for outcome in arm["outcomes"]])) for arm in arms]
    assert drawn.lines[0].get_xydata().ravel() == pytest.approx(np.array(expected).ravel())
    widths = [np.ptp(segment[:, 1]) / 2 for segment in drawn.lines[2][0].get_segments()]
    assert widths == pytest.approx([arm["recall@1"]["half_width"] for arm in arms])


def test_dots_are_recall_over_the_bridges_loss(grid: Grid) -> None:
    document = results(grid)
    axes = by_title(document)["Recall after the contrastive stage, by the bridge's loss"]
    arms = [arm for arm in document["arms"] if arm["group"] == "length" and arm["name"] == ALL_THREE]
    expected = {(outcome["bridge"]["loss"], outcome["recall@1"]) for arm in arms for outcome in arm["outcomes"]}
    assert {tuple(point) for line in axes.lines for point in line.get_xydata()} == expected


def test_the_figure_of_some_groups_has_their_panels_alone(grid: Grid) -> None:
    whole = by_title(results(grid))
    some = by_title(results(replace(grid, groups=["length", "variants"])))
    panels_of_others = {"The stages, 1000 pairs", "Fewer pairs", *(title for title in whole if "mask ratio" in title)}
    assert len(whole) == 8
    assert set(some) == set(whole) - panels_of_others


def test_a_figure_drawn_again_is_the_same(grid: Grid) -> None:
    document = results(grid)
    assert figure_svg(document) == figure_svg(document)


def test_a_figure_is_drawn_again_of_a_results_file_into_a_folder_that_is_not_there(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results(grid)))
    draw = ["ablation.py", "--draw", str(tmp_path / "results.json"), "--out", str(tmp_path / "new" / "folder")]
    monkeypatch.setattr(sys, "argv", draw)
    ablation.main()
    assert (tmp_path / "new" / "folder" / "ablation.svg").read_text() == figure_svg(results(grid))


@pytest.mark.parametrize(("seeds", "told"), [(1, "of one seed"), (3, "over 3 seeds with its 95% interval")])
def test_notes_speak_of_intervals_where_there_are_some(grid: Grid, seeds: int, told: str) -> None:
    for table in tables(results(grid, seeds)):
        assert told in table.notes[0]
        assert ("interval" in " ".join(table.notes)) is (seeds > 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arms": []}'])
def test_another_file_is_no_results_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--draw", str(tmp_path / "other.json")])
    with pytest.raises(SystemExit, match=r"other\.json is no whole results' file"):
        ablation.main()


def test_the_tables_show_the_numbers_of_the_file(grid: Grid) -> None:
    document = results(grid)
    stages = next(table for table in tables(document) if table.title == "The stages")
    arms = {arm["name"]: arm for arm in document["arms"] if arm["group"] == "stages"}
    assert len(stages.rows) == len(arms)
    for row in stages.rows:
        cells = dict(zip(stages.header, row, strict=True))
        recall = [outcome["recall@1"] for outcome in arms[cells["arm"]]["outcomes"]]
        alone = [outcome["recall@1"] for outcome in arms[ALONE]["outcomes"]]
        assert cells["recall@1"].startswith(f"{np.mean(recall):.3f} ± ")
        if cells["arm"] != ALONE:
            assert cells["less alone"].startswith(f"{np.mean(recall) - np.mean(alone):+.3f} ± ")


# Running it


@pytest.mark.slow
def test_arms_are_trained_once_and_scored_as_eval_pairs_would(place: Place, tiny: Sizes) -> None:
    grid = Grid(tiny, place.flops_per_row(), place.batch_sizes(), place.mask_ratio())
    arms = [arm for arm in grid.arms if arm.group == "length" and arm.share == 1.0]
    jobs = jobs_of(place, arms, [0])
    run_jobs(jobs, processes=1, threads=1)
    written = {path: path.stat().st_mtime_ns for path in place.work.rglob("*.safetensors")}
    run_jobs(jobs, processes=1, threads=1)
    assert written == {path: path.stat().st_mtime_ns for path in place.work.rglob("*.safetensors")}

    arm = next(arm for arm in arms if arm.name == ALL_THREE and arm.x == 0.25)
    found = outcome(place, arm, 0)
    checkpoint = place.folder(arm.last, 0) / "contrastive"
    encoder = Encoder(build_sentence_transformer(checkpoint, prompts={}), "checked")
    again = evaluate_pairs([encoder], read_pairs(place.data(0).held_out), resamples=10)
    assert found["recall@1"] == pytest.approx(again["averages"]["recall@1"])
    assert found["bridge"].keys() >= {"loss", "accuracy_matching_image", "accuracy_shuffled_image", "accuracy_no_image"}


@pytest.mark.slow
def test_a_run_that_is_ended_goes_on_where_it_was(place: Place, tiny: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_of(tiny)
    arm = next(arm for arm in grid.arms if arm.name == "warm-up, contrastive")
    jobs = jobs_of(place, [arm], [0])
    first, last = jobs
    run_jobs({first: jobs[first]}, processes=1, threads=1)
    trained = (first / "warmup" / "model.safetensors").stat().st_mtime_ns

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("arms.runner.wait", interrupt)
        with pytest.raises(CocoaError, match="interrupted; what is finished stays"):
            run_jobs(jobs, processes=1, threads=1)
    run_jobs(jobs, processes=1, threads=1)
    assert (first / "warmup" / "model.safetensors").stat().st_mtime_ns == trained
    assert read_scores(last).keys() == {"end"}


def test_a_folder_to_train_on_without_one_to_measure_on_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--training", "mine"])
    with pytest.raises(SystemExit) as ended:
        ablation.parse()
    assert ended.value.code == 2
    assert "--training and --held-out go together" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ablation", "ablation/longer-bridge"])
def test_the_documented_tables_are_those_of_the_documented_numbers(name: str) -> None:
    folder = Path(__file__).parents[2] / "docs" / name
    document = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    assert len(document["seeds"]) >= 3
    assert (folder / "ablation.md").read_text(encoding="utf-8") == to_markdown(ablation.TITLE, tables(document))
