"""What each stage of CoCoA is worth, at equal data and at equal compute, on drawn scenes or on your own pairs.

    python benchmarks/ablation.py                       # reduced: about an hour on two cores
    python benchmarks/ablation.py --profile full        # on a GPU
    python benchmarks/ablation.py --training FOLDER --held-out FOLDER --base my-recipe.yaml --pairs 5000
    python benchmarks/ablation.py --profile photos --training FOLDER --held-out FOLDER --backbone FOLDER --plan
    python benchmarks/ablation.py --draw ablation.json  # only tables and figure, from a results file

The arms: contrastive learning only, also with the compute of all three stages; with warm-up, with the bridge, with
both; with MoCa instead of them (for ``tiny`` and ``photos``); causal instead of bidirectional; ``<EOS>`` that does not
attend to block B; several mask ratios and lengths of the bridge; fewer pairs. Every arm is trained once for each seed,
with different scenes, order and masks; your own folders are the same for all seeds. In the bridge and the contrastive
stage, the learning rate is constant and rows are not grouped by length, so that a snapshot equals the result of a
shorter stage. Compute is counted in FLOPs of the training steps, without recomputation; the time is also reported.

``--profile photos`` compares the stages on captioned photographs instead: contrastive pairs of 100, 1,000 and all
images, with one caption or all of them, where warm-up and bridge see all captioned photographs or only those of the
pairs; and half of the bridge with more contrastive steps. ``--alone-learning-rate`` is the learning rate of contrastive
learning alone. ``--group settings`` adds settings that may make the bridge pay. Every held-out caption is a query.
``photos-full`` is for a GPU. ``--plan`` lists the arms with their hours; ``--arms`` and ``--images`` select some.

``--base`` names another recipe; its stages are used unchanged, except for what is compared. The weights themselves are
trained (no adapters), and the rows of every stage come from ``--training``.

Writes ``ablation.json`` (the numbers of every seed), ``ablation.md``, ``ablation.html`` and ``ablation.svg`` to
``--out``, again after each stage. The same command resumes an interrupted run. Weights stay in ``--work``, about 12 MB
per stage with the package's captioner.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch

from arms.figure import figure_svg
from arms.grid import FRACTIONS, Grid, Group, Sizes
from arms.photos import PhotoSizes
from arms.runner import jobs_of, outcome, run_jobs
from arms.summary import results_document, tables
from arms.workspace import UserFolders, Workspace
from cocoa_embed.cli.output import silence_libraries
from cocoa_embed.data.image_folder import METADATA_FILE
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation.result_cache import make_folder, write_result
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.report.tables import Table, to_html, to_markdown
from cocoa_embed.train.data.caption_rows import read_image_folder
from shared.measuring import best_device, machine
from shared.output import command_line

TINY = "tiny"
TINY_SETTINGS = (
    # At 1e-3 and 3e-4, contrastive learning alone gets less far in 150 steps (docs/experiments.md).
    "contrastive.learning_rate=6.0e-4",
    # Divides every number of pairs, so that all batches have the same size.
    "contrastive.batch_size=50",
    # As in moca-tiny: a scene has four visual tokens, and 0.5 would mask all of them in one scene of 16.
    "moca.image_mask_ratio=0.2",
)
REDUCED = Sizes(8000, 320, 1000, 300, 480, 40, variant_part=0.5, equal_fractions=(0.1, 1.0), captions_as_pairs=False)
PHOTOS = PhotoSizes(0, 0, 0, 80, 240, 40, probe_rows=128)
PROFILES = {
    "reduced": REDUCED,
    "full": Sizes(40_000, 2000, 1000, 300, 3000, 150),
    "photos": PHOTOS,
    "photos-full": replace(PHOTOS, warmup_steps=200, bridge_steps=1200, contrastive_steps=150, complete=True),
}
SIZES = ("pairs", "warmup_steps", "bridge_steps", "contrastive_steps")
TITLE = "What each stage is worth"
PROCESSES_PER_ACCELERATOR = 4
"""With so small a model, one process leaves an accelerator idle most of the time."""


def parse() -> argparse.Namespace:
    processes = PROCESSES_PER_ACCELERATOR if torch.accelerator.is_available() else os.cpu_count() or 1
    parser = command_line(__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="reduced")
    parser.add_argument("--base", help="the recipe of all stages [tiny, or photos]")
    parser.add_argument("--backbone", help="the folder or name of another backbone [the recipe's]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="override of that recipe")
    parser.add_argument("--alone-learning-rate", type=float, help="rate of contrastive learning alone [the recipe's]")
    parser.add_argument("--training", type=Path, help="an image folder to train on [drawn scenes]")
    parser.add_argument("--held-out", type=Path, help="an image folder to measure on, with --training")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="a number to use instead of the profile's")
    parser.add_argument("--images", type=int, nargs="+", help="numbers of images, instead of the profile's")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on [3]")
    parser.add_argument("--group", action="append", choices=get_args(Group), help="arms to run [all; photographs]")
    parser.add_argument(
        "--arms", nargs="+", default=[], metavar="PATTERN", help="arms to run, as '*1000 images*' [all]"
    )
    parser.add_argument("--plan", action="store_true", help="only list the arms and hours, from a few timed steps")
    parser.add_argument("--processes", type=int, default=processes, help="stages trained in parallel")
    parser.add_argument("--work", type=Path, default=Path("cocoa-ablation"), help="the folder for weights and data")
    parser.add_argument("--out", type=Path, help="the folder for results [--work]")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="only write tables and figure of a results file")
    options = parser.parse_args()
    if (options.training is None) != (options.held_out is None):
        parser.error("--training and --held-out go together")
    if options.seeds < 1 or options.processes < 1:
        parser.error("--seeds and --processes must be 1 or more")
    is_photos = isinstance(PROFILES[options.profile], PhotoSizes)
    if is_photos and options.training is None:
        parser.error(f"--profile {options.profile} needs --training and --held-out")
    if options.images and not is_photos:
        parser.error("--images goes with --profile photos; give --pairs instead")
    options.base = options.base or ("photos" if is_photos else TINY)
    options.group = options.group or (["photographs"] if is_photos else None)
    return options


def open_workspace(options: argparse.Namespace) -> Workspace:
    """Return the workspace of the command line.

    :raises CocoaError: If the folders or sizes cannot be used.
    """
    changed = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    sizes, folders = replace(PROFILES[options.profile], **changed), None
    if options.training is not None:
        folders = check_folders(options.training, options.held_out)
        rows = read_image_folder(folders.training, captions="captions")
        images = len({row.image for row in rows})
        probe_rows = min(sizes.probe_rows, images // 4)
        held_out = len(read_image_folder(folders.held_out))
        sizes = replace(sizes, training=images - probe_rows, probe_rows=probe_rows, held_out=held_out)
        if isinstance(sizes, PhotoSizes):
            counts = tuple(options.images or sizes.images)
            sizes = replace(sizes, training=images, pairs=images, captions=len(rows) / images, images=counts)
    if sizes.pairs > sizes.training:
        raise UsageError(
            f"--pairs {sizes.pairs} is more than the {sizes.training} images to train on; the bridge's probe takes"
            f" {sizes.probe_rows} others"
        )
    if (
        min(FRACTIONS) * sizes.pairs < 2
        or sizes.bridge_steps < 8
        or min(sizes.warmup_steps, sizes.contrastive_steps) < 1
    ):
        raise UsageError("give at least 20 pairs, 8 bridge steps, and 1 step of the other stages")
    settings = (*(TINY_SETTINGS if options.base == TINY else ()), *options.set)
    if torch.accelerator.is_available():
        settings = (f"workers={max(1, (os.cpu_count() or 1) // options.processes - 1)}", *settings)
    rate = options.alone_learning_rate
    return Workspace(options.work, sizes, options.base, settings, folders, options.backbone, rate)


def check_folders(training: Path, held_out: Path) -> UserFolders:
    """Check the user's image folders.

    :raises UsageError: If they are the same, or have no ``metadata.jsonl``.
    """
    if training.resolve() == held_out.resolve():
        raise UsageError(f"--training and --held-out are both {training}; measure on other images")
    for folder in (training, held_out):
        if not (folder / METADATA_FILE).is_file():
            raise UsageError(f"{folder} has no {METADATA_FILE}; write one with a line for each image")
    return UserFolders(training, held_out)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train and score all arms.

    :raises CocoaError: If the folders, the recipe or a stage cannot be used, or the run is interrupted.
    """
    workspace, seeds = open_workspace(options), list(range(options.seeds))
    started = time.perf_counter()
    threads = max(1, torch.get_num_threads() // options.processes)
    with workspace.lock():
        grid = chosen(workspace, options)
        run_jobs(
            jobs_of(workspace, grid.arms, seeds),
            options.processes,
            threads,
            lambda: write(results(options, workspace, grid, seeds, started), options.out or options.work),
        )
        return results(options, workspace, grid, seeds, started)


def chosen(workspace: Workspace, options: argparse.Namespace, *, is_timed: bool = False) -> Grid:
    """Return the grid of the chosen arms.

    :param is_timed: As in ``Workspace.grid``.
    :raises UsageError: If no arm is chosen.
    """
    grid = workspace.grid(options.group, options.arms, is_timed=is_timed)
    if not grid.arms:
        labels = "\n".join(map(grid.label, replace(grid, patterns=()).arms))
        raise UsageError(f"--arms {' '.join(options.arms)} matches none of these:\n{labels}")
    return grid


def list_arms(options: argparse.Namespace) -> Table:
    """Return the arms in order, with the hours that are left, estimated from a few timed steps.

    :raises CocoaError: If the folders or the recipe cannot be used.
    """
    workspace = open_workspace(options)
    torch.set_num_threads(max(1, torch.get_num_threads() // options.processes))
    with workspace.lock():
        grid = chosen(workspace, options, is_timed=True)
        seconds = grid.seconds_per_step
        counted, rows, total = set[Path](), [], 0.0
        for seed, arm in product(range(options.seeds), grid.arms):
            stages = {workspace.folder(each, seed): each for each, _ in arm.chain}
            new = [
                stages[folder]
                for folder in stages.keys() - counted
                if not (folder / stages[folder].stage / TRAINING_FILE).exists()
            ]
            counted |= stages.keys()
            total += (hours := sum(each.steps * seconds[each.stage] for each in new) / 3600)
            steps = " + ".join(f"{each.stage} {count}" for each, count in arm.chain)
            rows.append([str(seed), grid.label(arm), steps, f"{hours:.2f}", f"{total:.2f}"])
    times = ", ".join(f"{stage} {each:.2f} s" for stage, each in seconds.items())
    note = (
        f"A step takes: {times}, with {torch.get_num_threads()} threads. hours to go: of one process, for stages that"
        f" no arm above has, without scoring; with {options.processes} processes {total / options.processes:.1f} in"
        " all."
    )
    return Table("Plan", ["seed", "arm", "steps", "hours to go", "in all"], rows, [note])


def results(
    options: argparse.Namespace, workspace: Workspace, grid: Grid, seeds: list[int], started: float
) -> dict[str, Any]:
    """Return the results of the arms that are finished."""
    outcomes = [[outcome(workspace, arm, seed) for seed in seeds] for arm in grid.arms]
    return {
        "profile": options.profile,
        "base": workspace.base,
        "settings": list(workspace.settings),
        "alone_learning_rate": workspace.alone_learning_rate,
        "seeds": seeds,
        "processes": options.processes,
        "seconds_of_this_call": round(time.perf_counter() - started, 1),
        "data": "scenes, drawn for each seed" if (own := workspace.folders) is None else list(map(str, astuple(own))),
        **machine(best_device()),
        **results_document(grid, outcomes),
    }


def write(document: dict[str, Any], out: Path) -> None:
    """Write the results as JSON, Markdown, HTML and a figure."""
    found = tables(document)
    texts = {
        "json": json.dumps(document, indent=1) + "\n",
        "md": to_markdown(TITLE, found),
        "html": to_html(TITLE, found),
        "svg": figure_svg(document),
    }
    make_folder(out)
    for suffix, text in texts.items():
        write_result(out / f"ablation.{suffix}", text)


def write_again(results: Path, out: Path) -> None:
    """Write the tables and the figure of a results file.

    :raises CocoaError: If it is not a results file, or the output cannot be written.
    """
    try:
        write(json.loads(results.read_text(encoding="utf-8")), out)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CocoaError(f"{results} is not a complete results file of this benchmark ({error})") from error


def main() -> None:
    options = parse()
    silence_libraries()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # several processes share one device
    try:
        if options.draw is not None:
            write_again(options.draw, options.out or options.draw.parent)
            return
        if options.plan:
            print(to_markdown(TITLE, [list_arms(options)]))
            return
        document = run(options)
        write(document, options.out or options.work)
    except CocoaError as error:
        sys.exit(f"ablation: {error}")
    print(json.dumps(document, indent=1) if options.json else to_markdown(TITLE, tables(document)))


if __name__ == "__main__":
    main()
