"""Train and score the arms of a grid: each stage once, in processes side by side; what is finished stays so."""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from arms.grid import Arm, StageRun
from arms.place import Given, Place
from cocoa_embed.cli.terminal import silence_libraries
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.pairs import METRICS, directions, score_queries
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.folders import write_whole
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.model.training_record import is_bidirectional, read_training
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.loop.snapshots import snapshot_folder

SCORES = "scores.json"
END = "end"

LEARNED = (
    "loss",
    "accuracy_matching_image",
    "accuracy_shuffled_image",
    "accuracy_no_image",
    "alignment",
    "uniformity",
    "modality_gap",
    "effective_rank",
)
"""What the log of a bridge tells of the model that it leaves."""

PACKAGES = ("cocoa-embed", "torch", "transformers", "sentence-transformers")


@dataclass(frozen=True)
class Job:
    """A stage of one seed, as a process needs to know it.

    :param before: The folder of the stage that it starts from.
    :param scored: The steps whose weights are scored, None for the last.
    """

    recipe: Recipe
    stage: str
    folder: Path
    before: Path | None
    held_out: Path
    scored: tuple[int | None, ...]


def jobs_of(place: Place, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[Path, Job]:
    """Return each stage that the arms need, by its folder."""
    jobs: dict[Path, Job] = {}
    for seed in seeds:
        scored: dict[Path, set[int | None]] = {}
        needed: dict[Path, StageRun] = {}
        for arm in arms:
            scored.setdefault(place.folder(arm.last, seed), set()).add(arm.at_step)
            needed |= {place.folder(each, seed): each for each in _with_starts(arm.last)}
        for folder, each in needed.items():
            jobs[folder] = Job(
                recipe=place.recipe(each, seed, backbone=place.start_folder(each, seed)),
                stage=each.stage,
                folder=folder,
                before=None if each.start is None else place.folder(each.start, seed),
                held_out=place.data(seed).held_out,
                scored=tuple(sorted(scored.get(folder, ()), key=lambda step: step or each.steps)),
            )
    return jobs


def _with_starts(stage_run: StageRun) -> list[StageRun]:
    return [*([] if stage_run.start is None else _with_starts(stage_run.start)), stage_run]


def run_jobs(jobs: dict[Path, Job], processes: int, threads: int) -> None:
    """Run each job when the one that it starts from is done, the longest first.

    :param threads: Of torch, in each process.
    :raises CocoaError: If a job fails, or the run is interrupted; what is finished stays.
    """
    waiting = dict(jobs)
    running: dict[Future[None], Path] = {}
    done: set[Path] = set()
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=prepare_process, initargs=(os.getpid(), threads)
    )
    with tqdm(total=len(jobs), desc="stages", unit="stage") as bar:
        try:
            while waiting or running:
                ready = [job for job in waiting.values() if job.before is None or job.before in done]
                for job in sorted(ready, key=lambda job: -_length(job))[: processes - len(running)]:
                    running[pool.submit(train_and_score, waiting.pop(job.folder))] = job.folder
                for finished in wait(running, return_when=FIRST_COMPLETED).done:
                    folder = running.pop(finished)
                    _refuse_failure(finished, folder)
                    done.add(folder)
                    bar.update()
        except KeyboardInterrupt:
            raise CocoaError("interrupted; what is finished stays, and the same command goes on from there") from None
        finally:
            pool.shutdown(wait=not running, cancel_futures=True)


def _refuse_failure(finished: Future[None], folder: Path) -> None:
    try:
        finished.result()
    except BrokenProcessPool as error:
        raise CocoaError(
            "a process was killed, most likely for memory; lower --processes, what is finished stays"
        ) from error
    except CocoaError as error:
        raise CocoaError(f"{folder.name}: {error} (its output is in {told_file(folder)})") from error


def prepare_process(parent: int, threads: int) -> None:
    """Make a process ready for jobs: it ends with the one that has started it, whatever that one ended of."""
    torch.set_num_threads(threads)
    silence_libraries()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _length(job: Job) -> int:
    section = job.recipe.stages[job.stage].settings
    return (section.steps or 0) * section.batch_size


def told_file(folder: Path) -> Path:
    """Return where a job's progress and messages go."""
    return folder.with_name(f"{folder.name}.txt")


def train_and_score(job: Job) -> None:
    """Train a stage, going on where it was ended, and score its weights; nothing is done twice."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with told_file(job.folder).open("a") as told, contextlib.redirect_stderr(told):
        (result,) = run(job.recipe, job.folder, resume=True)
        scores = read_scores(job.folder)
        for step in job.scored:
            if str(step or END) not in scores:
                checkpoint = result.folder if step is None else snapshot_folder(result.folder, step)
                scores[str(step or END)] = score(checkpoint, job.held_out)
                write_whole(job.folder / SCORES, json.dumps(scores, indent=2) + "\n")


def read_scores(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return what has been scored of a stage: metrics by direction, by step."""
    path = folder / SCORES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def score(checkpoint: Path, held_out: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of a checkpoint on the pairs of an image folder, by direction."""
    training = read_training(checkpoint)
    model = build_sentence_transformer(
        checkpoint, prompts=training["recipe"]["prompts"], bidirectional=is_bidirectional(training)
    )
    encoder = Encoder(model, str(checkpoint))
    metrics = {}
    for direction in directions(read_pairs(held_out)):
        means = score_queries(encoder, direction).mean(axis=0)
        metrics[direction.name] = {name: float(mean) for name, mean in zip(METRICS, means, strict=True)}
    return metrics


def outcome(place: Place, arm: Arm, seed: int) -> dict[str, Any]:
    """Return what came out of an arm: its metrics, its training time, and what its bridge had learned."""
    scores = read_scores(place.folder(arm.last, seed))[str(arm.at_step or END)]
    seconds, learned = 0.0, {}
    for stage_run, steps in arm.steps():
        folder = place.folder(stage_run, seed) / stage_run.stage
        record = read_training(folder)["stages"][-1]
        seconds += record["seconds"] * steps / record["steps"]
        if stage_run.stage == "bridge":
            learned = _at_step(json.loads((folder / "log.json").read_text(encoding="utf-8")), steps)
    return {
        "seed": seed,
        "recall@1": sum(metrics["recall@1"] for metrics in scores.values()) / len(scores),
        "mrr": sum(metrics["mrr"] for metrics in scores.values()) / len(scores),
        "directions": scores,
        "seconds": seconds,
        "bridge": learned,
    }


def _at_step(log: list[dict[str, float]], step: int) -> dict[str, float]:
    return {name: line[name] for line in log if line["step"] <= step for name in LEARNED if name in line}


def circumstances(given: Given | None) -> dict[str, Any]:
    """Return where and with what an ablation was run, and on which data if they were not drawn."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "data": "scenes, drawn for each seed" if given is None else [str(given.training), str(given.held_out)],
    }
