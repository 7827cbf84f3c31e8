"""What each stage of CoCoA is worth, at equal data and at equal compute, on scenes drawn for it or on any pairs.

    python benchmarks/ablation.py                       # reduced: under an hour on two cores
    python benchmarks/ablation.py --profile full        # on a GPU
    python benchmarks/ablation.py --training FOLDER --held-out FOLDER --base my-recipe.yaml --pairs 5000

The arms: contrastive learning only, and with the compute of all three stages; with warm-up, with the bridge, with
both; causal instead of bidirectional; ``<EOS>`` kept from seeing block B; the bridge's mask ratio and its length; fewer
pairs. Every arm is trained from each seed with other data, another order and other hidden tokens. Learning rates are
held after their warm-up, so that weights kept on the way are those of a shorter training. Compute is counted in
floating-point operations of the training steps, and the time is told beside it.

Writes ``ablation.json`` (every seed's numbers), ``ablation.md``, ``ablation.html`` and ``ablation.svg`` to ``--out``. A
run that was ended goes on where it was.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers

from arms.figure import write_figure
from arms.grid import Grid, Sizes
from arms.runner import Data, Laboratory, jobs_of, outcome, run_jobs
from arms.summary import arm_document, tables
from cocoa_embed.cli import silence_libraries
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.tables import to_html, to_markdown

SETTINGS = (
    "warmup.schedule=constant_with_warmup",
    "bridge.schedule=constant_with_warmup",
    "contrastive.schedule=constant_with_warmup",
    "contrastive.learning_rate=6.0e-4",
    "contrastive.batch_size=64",
    "contrastive.cache_chunk=64",
)
PROFILES = {
    "reduced": Sizes(8000, 500, 1000, 200, 640, 50, compared_part=0.5, equal_shares=(0.1, 1.0), settings=SETTINGS),
    "full": Sizes(40_000, 2000, 1000, 300, 4000, 200, settings=SETTINGS),
}
TITLE = "What each stage is worth"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="reduced")
    parser.add_argument("--base", default="tiny", help="the recipe that settings are taken from [tiny]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="changed in that recipe")
    parser.add_argument("--training", type=Path, help="an image folder to train on [drawn scenes]")
    parser.add_argument("--held-out", type=Path, help="an image folder to measure on, with --training")
    for name in ("pairs", "warmup-steps", "bridge-steps", "contrastive-steps"):
        parser.add_argument(f"--{name}", type=int, help="instead of the profile's")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument(
        "--processes", type=int, default=max(1, os.cpu_count() or 1), help="stages trained side by side"
    )
    parser.add_argument("--work", type=Path, default=Path("cocoa-ablation"), help="where weights and data go")
    parser.add_argument("--out", type=Path, help="where results go [--work]")
    parser.add_argument("--redraw", type=Path, metavar="FILE", help="draw the figure of a results' file, train nothing")
    parser.add_argument("--json", action="store_true", help="print the results' document")
    options = parser.parse_args()
    if (options.training is None) != (options.held_out is None):
        parser.error("--training and --held-out go together")
    return options


def laboratory(options: argparse.Namespace) -> Laboratory:
    names = ("pairs", "warmup_steps", "bridge_steps", "contrastive_steps")
    changed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    profile = PROFILES[options.profile]
    sizes = dataclasses.replace(profile, settings=(*profile.settings, *options.set), **changed)
    given = None if options.training is None else Data(options.training, options.held_out)
    return Laboratory(options.work, sizes, options.base, given)


def run(options: argparse.Namespace) -> dict[str, Any]:
    place = laboratory(options)
    place.open()
    grid = Grid(place.sizes, place.flops_per_step())
    seeds = list(range(options.seeds))
    started = time.perf_counter()
    run_jobs(jobs_of(place, grid.arms, seeds), options.processes, max(1, torch.get_num_threads() // options.processes))
    has_gpu = torch.cuda.is_available()
    return {
        "profile": options.profile,
        "sizes": dataclasses.asdict(place.sizes),
        "base": place.base,
        "seeds": seeds,
        "flops_per_step": dict(grid.per_step),
        "seconds_of_this_call": round(time.perf_counter() - started, 1),
        "processes": options.processes,
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, sentence_transformers)},
        "arms": [arm_document(grid, arm, [outcome(place, arm, seed) for seed in seeds]) for arm in grid.arms],
    }


def write(document: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "ablation.md").write_text(to_markdown(TITLE, tables(document)))
    (out / "ablation.html").write_text(to_html(TITLE, tables(document)))
    write_figure(document, out / "ablation.svg")


def main() -> None:
    options = parse()
    silence_libraries()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # several processes share one device, not one process several
    try:
        document = json.loads(options.redraw.read_text()) if options.redraw else run(options)
        write(document, options.out or options.work)
    except CocoaError as error:
        sys.exit(f"ablation: {error}")
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        print(to_markdown(TITLE, tables(document)))


if __name__ == "__main__":
    main()
