"""What a busy neighbour costs a training step on the CPU, with different ways for OpenMP threads to wait.

    python benchmarks/cpu_neighbours.py [--rounds 5] [--steps 4] [--settings torch_defaults ours] [--json]

One process for each setting runs contrastive steps (forward, backward and AdamW of the demo's backbone on 32 pairs) in
three situations: alone, beside a process that keeps one core busy, and beside a second torch process with torch's
defaults. The settings take turns within a round, so that other load on the machine falls on all of them; the figures
are medians over all steps. On a machine that is never quiet, the fastest step alone comes closest to a quiet one.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, str]] = {
    "torch_defaults": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin_300": {"GOMP_SPINCOUNT": "300"},
    "ours": {"GOMP_SPINCOUNT": "1000"},
    "spin_3000": {"GOMP_SPINCOUNT": "3000"},
    "one_thread": {"OMP_NUM_THREADS": "1"},
}
NEIGHBOURS = ("alone", "busy_process", "torch_process")
PAIRS = 32
SETTLE_SECONDS = 0.5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often every setting takes its turn")
    parser.add_argument("--steps", type=int, default=4, help="measured steps in a turn")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="settings to compare")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class Steps:
    """Contrastive steps of the demo's backbone on drawn scenes."""

    def __init__(self) -> None:
        import torch

        from cocoa_embed.demo.scenes import draw, sample_scene
        from cocoa_embed.model.backbone import builtin_backbones, load_backbone
        from cocoa_embed.model.export import build_sentence_transformer

        with tempfile.TemporaryDirectory() as folder:
            load_backbone(builtin_backbones()[0], max_length=256).save(Path(folder))
            self._model = build_sentence_transformer(Path(folder), prompts={"query": "", "document": ""})
        self._model.to("cpu").train()
        generator = random.Random(0)
        scenes = [sample_scene(generator, "train") for _ in range(PAIRS)]
        self._inputs = [
            self._model.preprocess([{"image": draw(scene, generator)} for scene in scenes]),
            self._model.preprocess([{"text": "a large red circle above a small blue square"} for _ in scenes]),
        ]
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5)

    def run(self, count: int) -> list[float]:
        """Return the seconds of each step."""
        import torch

        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            images, texts = (self._model(dict(inputs))["sentence_embedding"] for inputs in self._inputs)
            loss = torch.nn.functional.cross_entropy(20 * images @ texts.T, torch.arange(PAIRS))
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
        return seconds


def serve() -> None:
    """Run as many steps as each line of standard input says, and answer with their seconds."""
    steps = Steps()
    steps.run(2)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(steps.run(int(line))) + "\n")
        sys.stdout.flush()


class Worker:
    """A process that runs steps under one setting."""

    def __init__(self, environment: dict[str, str]) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env={**clean, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._answer() != "ready":
            raise SystemExit("a worker did not start; run this script with --worker to see why")

    def ask(self, steps: int) -> None:
        """Start steps without waiting for them."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def run(self, steps: int) -> list[float]:
        """Return the seconds of each step."""
        self.ask(steps)
        seconds: list[float] = json.loads(self._answer())
        return seconds

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def busy(process: subprocess.Popen[Any] | None) -> Iterator[None]:
    """Let a stopped process run."""
    if process is None:
        yield
        return
    process.send_signal(signal.SIGCONT)
    time.sleep(SETTLE_SECONDS)
    try:
        yield
    finally:
        process.send_signal(signal.SIGSTOP)


def measure(settings: list[str], rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each step by setting and neighbour."""
    workers = {name: Worker(SETTINGS[name]) for name in settings}
    neighbour = Worker({})
    neighbour.ask(10**9)
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    processes = {"alone": None, "busy_process": spinner, "torch_process": neighbour.process}
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in NEIGHBOURS} for name in settings}
    try:
        for process in (spinner, neighbour.process):
            process.send_signal(signal.SIGSTOP)
        for _ in range(rounds):
            for kind in NEIGHBOURS:
                with busy(processes[kind]):
                    for name, worker in workers.items():
                        seconds[name][kind] += worker.run(steps)
    finally:
        for process in (spinner, neighbour.process, *(worker.process for worker in workers.values())):
            process.kill()
            process.wait()
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
            name: {kind: own[f"{kind}_seconds_per_step"] / own["alone_seconds_per_step"] for kind in NEIGHBOURS[1:]}
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
        figures = (f"{kind} {seconds[kind]:.3f} ({ratio.get(kind, 1):.2f})" for kind in NEIGHBOURS)
        print(f"{name:16} {', '.join(figures)}")


def main() -> None:
    options = parse()
    if options.worker:
        serve()
        return
    result = document(measure(options.settings, options.rounds, options.steps))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
