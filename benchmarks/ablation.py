"""What each stage of CoCoA is worth, at equal data and at equal compute, on scenes drawn for it or on any pairs.

    python benchmarks/ablation.py                       # reduced: under an hour on two cores
    python benchmarks/ablation.py --profile full        # on a GPU
    python benchmarks/ablation.py --training FOLDER --held-out FOLDER --base my-recipe.yaml --pairs 5000
    python benchmarks/ablation.py --draw ablation.json  # the figure alone, from a results' file

The arms: contrastive learning only, and with the compute of all three stages; with warm-up, with the bridge, with
both; causal instead of bidirectional; ``<EOS>`` kept from seeing block B; the bridge's mask ratio and its length; fewer
pairs. Every arm is trained from each seed with other scenes, another order and other hidden tokens; folders of your own
are the same for all seeds. In the bridge and the contrastive stage learning rates are held, and rows come in the same
order however long they last, so that weights kept on the way are those of a shorter training. Compute is counted in
floating-point operations of the training steps, without what is computed again to save memory; the time is told beside
it.

Of a recipe given by ``--base``, each stage's settings are used as they are, but for what is compared; the weights
themselves are trained (no adapters), and every stage's rows come from ``--training``.

Writes ``ablation.json`` (every seed's numbers), ``ablation.md``, ``ablation.html`` and ``ablation.svg`` to ``--out``. A
run that was ended goes on where it was. Weights stay in ``--work``, some 12 MB a stage with the package's captioner.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from arms.figure import figure_svg
from arms.grid import SHARES, Grid, Sizes
from arms.place import Given, Place
from arms.runner import circumstances, jobs_of, outcome, run_jobs
from arms.summary import results_document, tables
from cocoa_embed.cli.terminal import silence_libraries
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation.result_cache import make_folder, write_result
from cocoa_embed.images.find_files import METADATA_FILE
from cocoa_embed.report.tables import to_html, to_markdown
from cocoa_embed.train.data.rows import read_image_folder

TINY = "tiny"
TINY_SETTINGS = (
    # At 1e-3 and 3e-4 contrastive learning alone came less far in 150 steps (docs/experiments.md).
    "contrastive.learning_rate=6.0e-4",
    # Divides every number of pairs, so that no batch is smaller than the others.
    "contrastive.batch_size=50",
    "contrastive.mini_batch_size=50",
)
REDUCED = Sizes(8000, 320, 1000, 300, 480, 40, compared_part=0.5, equal_shares=(0.1, 1.0), captions_as_pairs=False)
PROFILES = {"reduced": REDUCED, "full": Sizes(40_000, 2000, 1000, 300, 3000, 150)}
SIZES = ("pairs", "warmup_steps", "bridge_steps", "contrastive_steps")
TITLE = "What each stage is worth"
FIGURE = "ablation.svg"
ON_ACCELERATOR = 4
"""Processes that share an accelerator, which one process with so small a model leaves idle most of the time."""


def parse() -> argparse.Namespace:
    has_accelerator = torch.accelerator.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="reduced")
    parser.add_argument("--base", default=TINY, help="the recipe that settings are taken from [tiny]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="changed in that recipe")
    parser.add_argument("--training", type=Path, help="an image folder to train on [drawn scenes]")
    parser.add_argument("--held-out", type=Path, help="an image folder to measure on, with --training")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the profile's")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on [3]")
    parser.add_argument("--group", action="append", help="stages, variants, mask ratio, pairs or length [all]")
    parser.add_argument(
        "--processes",
        type=int,
        default=ON_ACCELERATOR if has_accelerator else os.cpu_count() or 1,
        help="stages trained side by side",
    )
    parser.add_argument("--work", type=Path, default=Path("cocoa-ablation"), help="where weights and data go")
    parser.add_argument("--out", type=Path, help="where results go [--work]")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the figure of a results' file, train nothing")
    parser.add_argument("--json", action="store_true", help="print the results' document")
    options = parser.parse_args()
    if (options.training is None) != (options.held_out is None):
        parser.error("--training and --held-out go together")
    if options.seeds < 1 or options.processes < 1:
        parser.error("--seeds and --processes are 1 or more")
    return options


def place_of(options: argparse.Namespace) -> Place:
    """Return where the ablation is made, and from what.

    :raises CocoaError: If the folders or sizes cannot be used.
    """
    changed = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    sizes, given = replace(PROFILES[options.profile], **changed), None
    if options.training is not None:
        given = given_folders(options.training, options.held_out)
        images = {row.image for row in read_image_folder(given.training)}
        kept_out = min(sizes.kept_out, len(images) // 4)
        held_out = len(read_image_folder(given.held_out))
        sizes = replace(sizes, training=len(images) - kept_out, kept_out=kept_out, held_out=held_out)
    if sizes.pairs > sizes.training:
        raise UsageError(
            f"--pairs {sizes.pairs} are more than the {sizes.training} images to train on, without the {sizes.kept_out}"
            " that the bridge keeps out"
        )
    if min(SHARES) * sizes.pairs < 2 or sizes.bridge_steps < 8 or min(sizes.warmup_steps, sizes.contrastive_steps) < 1:
        raise UsageError("give 20 pairs or more, 8 bridge steps or more, and a step or more of the other stages")
    settings = (*(TINY_SETTINGS if options.base == TINY else ()), *options.set)
    if torch.accelerator.is_available():
        settings = (f"workers={max(1, (os.cpu_count() or 1) // options.processes - 1)}", *settings)
    return Place(options.work, sizes, options.base, settings, given)


def given_folders(training: Path, held_out: Path) -> Given:
    """Check image folders of the user's own.

    :raises UsageError: If they are the same, or have no ``metadata.jsonl``.
    """
    if training.resolve() == held_out.resolve():
        raise UsageError(f"--training and --held-out are both {training}; measure on other images")
    for folder in (training, held_out):
        if not (folder / METADATA_FILE).is_file():
            raise UsageError(f"{folder} has no {METADATA_FILE}, which the ablation reads; write a line for each image")
    return Given(training, held_out)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train and score all arms.

    :raises CocoaError: If the folders, the recipe or a stage cannot be used, or the run is interrupted.
    """
    place = place_of(options)
    seeds = list(range(options.seeds))
    started = time.perf_counter()
    with place.open():
        grid = Grid(place.sizes, place.flops_per_row(), place.batch_sizes(), place.mask_ratio(), options.group)
        threads = max(1, torch.get_num_threads() // options.processes)
        run_jobs(jobs_of(place, grid.arms, seeds), options.processes, threads)
        outcomes = [[outcome(place, arm, seed) for seed in seeds] for arm in grid.arms]
    return {
        "profile": options.profile,
        "base": place.base,
        "settings": list(place.settings),
        "seeds": seeds,
        "processes": options.processes,
        "seconds_of_this_call": round(time.perf_counter() - started, 1),
        **circumstances(place.given),
        **results_document(grid, outcomes),
    }


def write(document: dict[str, Any], out: Path) -> None:
    found = tables(document)
    make_folder(out)
    write_result(out / "ablation.json", json.dumps(document, indent=1) + "\n")
    write_result(out / "ablation.md", to_markdown(TITLE, found))
    write_result(out / "ablation.html", to_html(TITLE, found))
    write_result(out / FIGURE, figure_svg(document))


def draw_again(results: Path, out: Path | None) -> None:
    """Draw the figure of a results' file beside it.

    :raises CocoaError: If it is none, or the figure cannot be written.
    """
    folder = out or results.parent
    try:
        figure = figure_svg(json.loads(results.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CocoaError(f"{results} is no whole results' file of this benchmark ({error})") from error
    make_folder(folder)
    write_result(folder / FIGURE, figure)


def main() -> None:
    options = parse()
    silence_libraries()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # several processes share one device, not one process several
    try:
        if options.draw is not None:
            draw_again(options.draw, options.out)
            return
        document = run(options)
        write(document, options.out or options.work)
    except CocoaError as error:
        sys.exit(f"ablation: {error}")
    print(json.dumps(document, indent=1) if options.json else to_markdown(TITLE, tables(document)))


if __name__ == "__main__":
    main()
