"""How much a busy neighbour slows down a training step on the CPU, for different ways of OpenMP threads to wait.

    python benchmarks/cpu_neighbours.py [--rounds 5] [--steps 4] [--settings torch_defaults ours] [--json]

Contrastive steps (forward, backward and AdamW of the demo's backbone on 32 pairs) run in three situations: alone, with
a process that keeps one core busy, and with a second torch process that has torch's defaults. The settings take turns
in each round and situation, each in a new process, so that other load on the machine affects all of them. Times are
medians over all steps. On a machine that is never quiet, the fastest step that ran alone is the closest to a quiet one.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from shared.output import command_line, report

SETTINGS: dict[str, dict[str, str]] = {
    "torch_defaults": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin_300": {"GOMP_SPINCOUNT": "300"},
    "ours": {"GOMP_SPINCOUNT": "1000"},
    "spin_3000": {"GOMP_SPINCOUNT": "3000"},
    "one_thread": {"OMP_NUM_THREADS": "1"},
}
ENDLESS = 10**9
STEPS = [sys.executable, __file__, "--worker", "--steps"]
NEIGHBOURS = {
    "alone": ["sleep", "infinity"],
    "busy_process": [sys.executable, "-c", "while True: pass"],
    "torch_process": [*STEPS, str(ENDLESS)],
}
PAIRS = 32
WARM_UP_STEPS = 2


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each setting is measured")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a round")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="settings to compare")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_steps(count: int) -> list[float]:
    """Return the seconds of each contrastive step of the demo's backbone on drawn scenes."""
    import torch

    from cocoa_embed.demo.scenes import draw, sample_scene
    from shared.models import untrained_model

    with tempfile.TemporaryDirectory() as folder:
        model = untrained_model(Path(folder), max_length=256).to("cpu").train()
    generator = random.Random(0)
    images = [{"image": draw(sample_scene(generator, "train"), generator)} for _ in range(PAIRS)]
    texts = [{"text": "a large red circle above a small blue square"}] * PAIRS
    both = [model.preprocess(images), model.preprocess(texts)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds = []
    for _ in range(WARM_UP_STEPS + count):
        started = time.perf_counter()
        queries, documents = (model(dict(inputs))["sentence_embedding"] for inputs in both)
        torch.nn.functional.cross_entropy(20 * queries @ documents.T, torch.arange(PAIRS)).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP_STEPS:]


def measure(settings: list[str], rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each step by setting and neighbour."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in NEIGHBOURS} for name in settings}
    for _, (kind, command), name in product(range(rounds), NEIGHBOURS.items(), settings):
        with subprocess.Popen(command, env=clean, stdout=subprocess.DEVNULL) as neighbour:
            try:
                worker = subprocess.run([*STEPS, str(steps)], env={**clean, **SETTINGS[name]}, stdout=subprocess.PIPE)
            finally:
                neighbour.kill()
        if worker.returncode:
            raise SystemExit("a worker failed; its message is above")
        seconds[name][kind] += json.loads(worker.stdout)
    return seconds


def document(seconds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    medians = {
        name: {f"{kind}_seconds_per_step": statistics.median(times) for kind, times in by_kind.items()}
        for name, by_kind in seconds.items()
    }
    return {
        "settings": {name: SETTINGS[name] for name in seconds},
        "medians": medians,
        "ratio": {
            name: {
                kind: own[f"{kind}_seconds_per_step"] / own["alone_seconds_per_step"] for kind in list(NEIGHBOURS)[1:]
            }
            for name, own in medians.items()
        },
        "fastest_alone_seconds_per_step": {name: min(by_kind["alone"]) for name, by_kind in seconds.items()},
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['cores']} cores, load average {result['load_average']:.1f}; seconds per step and ratio to alone")
    for name, medians in result["medians"].items():
        ratio = result["ratio"][name]
        seconds = {kind: medians[f"{kind}_seconds_per_step"] for kind in NEIGHBOURS}
        times = (f"{kind} {seconds[kind]:.3f} ({ratio.get(kind, 1):.2f})" for kind in NEIGHBOURS)
        print(f"{name:16} {', '.join(times)}")


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(run_steps(options.steps)))
        return
    report(document(measure(options.settings, options.rounds, options.steps)), show, as_json=options.json)


if __name__ == "__main__":
    main()
