"""Train and score the arms of a grid: each stage once, in parallel processes; finished stages are reused."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from arms.grid import Arm, StageRun
from arms.workspace import Workspace
from cocoa_embed.cli.output import silence_libraries
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.pairs import evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.folders import write_atomically
from cocoa_embed.model.training_record import read_run, read_training
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.loop.checkpoints import snapshot_folder

SCORES = "scores.json"
END = "end"

BRIDGE_METRICS = (
    "loss",
    "accuracy_matching_image",
    "accuracy_shuffled_image",
    "accuracy_no_image",
    "alignment",
    "uniformity",
    "modality_gap",
    "effective_rank",
)
"""The last values of the bridge's log that are results."""

Scores = dict[str, dict[str, dict[str, float]]]
"""Metrics by step and direction."""


@dataclass(frozen=True)
class Job:
    """A stage of one seed.

    :param before: The folder of the stage that it starts from.
    :param scored: The steps whose weights are scored, None for the last.
    """

    recipe: Recipe
    stage: str
    folder: Path
    before: Path | None
    held_out: Path
    scored: tuple[int | None, ...]

    @property
    def rows(self) -> int:
        """Rows of all steps."""
        section = self.recipe.stages[self.stage].settings
        return (section.steps or 0) * section.batch_size

    @property
    def output_file(self) -> Path:
        """Where progress and messages of the training go."""
        return self.folder.with_name(f"{self.folder.name}.txt")


def jobs_of(workspace: Workspace, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[Path, Job]:
    """Return each stage that the arms need, by its folder."""
    jobs: dict[Path, Job] = {}
    for seed in seeds:
        scored: dict[Path, set[int | None]] = {}
        needed: dict[Path, StageRun] = {}
        for arm in arms:
            scored.setdefault(workspace.folder(arm.last, seed), set()).add(arm.at_step)
            needed |= {workspace.folder(stage_run, seed): stage_run for stage_run, _ in arm.chain}
        for folder, each in needed.items():
            jobs[folder] = Job(
                recipe=workspace.recipe(each, seed, backbone=workspace.start_folder(each, seed)),
                stage=each.stage,
                folder=folder,
                before=None if each.start is None else workspace.folder(each.start, seed),
                held_out=workspace.data(seed).held_out,
                scored=tuple(sorted(scored.get(folder, ()), key=lambda step: step or each.steps)),
            )
    return jobs


def run_jobs(jobs: dict[Path, Job], processes: int, threads: int) -> None:
    """Run each job when the one that it starts from is done, the longest first.

    :param threads: Of torch, in each process.
    :raises CocoaError: If a job fails or the run is interrupted; finished jobs stay.
    """
    waiting = dict(jobs)
    running: dict[Future[None], Job] = {}
    done: set[Path] = set()
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=prepare_process, initargs=(os.getpid(), threads)
    )
    with tqdm(total=len(jobs), desc="stages", unit="stage") as bar:
        try:
            while waiting or running:
                ready = [job for job in waiting.values() if job.before is None or job.before in done]
                for job in sorted(ready, key=lambda job: -job.rows)[: processes - len(running)]:
                    running[pool.submit(train_and_score, waiting.pop(job.folder))] = job
                for finished in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(finished)
                    _refuse_failure(finished, job)
                    done.add(job.folder)
                    bar.update()
        except KeyboardInterrupt:
            raise CocoaError("interrupted; finished stages stay, the same command continues from there") from None
        finally:
            pool.shutdown(wait=not running, cancel_futures=True)


def _refuse_failure(finished: Future[None], job: Job) -> None:
    try:
        finished.result()
    except BrokenProcessPool as error:
        raise CocoaError(
            "a process was killed, most likely for lack of memory; lower --processes, finished stages stay"
        ) from error
    except CocoaError as error:
        raise CocoaError(f"{job.folder.name}: {error} (its output is in {job.output_file})") from error


def prepare_process(parent: int, threads: int) -> None:
    """Prepare a process for jobs; it ends when its parent ends, even if killed."""
    torch.set_num_threads(threads)
    silence_libraries()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def train_and_score(job: Job) -> None:
    """Train a stage, or resume it, and score its weights; nothing is done twice."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.output_file.open("a") as output, contextlib.redirect_stderr(output):
        (result,) = run(job.recipe, job.folder, resume=True)
        scores = read_scores(job.folder)
        for step in job.scored:
            if str(step or END) not in scores:
                checkpoint = result.folder if step is None else snapshot_folder(result.folder, step)
                scores[str(step or END)] = score(checkpoint, job.held_out)
                write_atomically(job.folder / SCORES, json.dumps(scores, indent=2) + "\n")


def read_scores(folder: Path) -> Scores:
    """Return the scores of a stage."""
    path = folder / SCORES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def score(checkpoint: Path, held_out: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of a checkpoint on the pairs of an image folder, by direction."""
    metrics: dict[str, dict[str, float]] = evaluate_pairs(
        [load_encoder(checkpoint)], read_pairs(held_out), resamples=10
    )["subsets"]
    return metrics


def outcome(workspace: Workspace, arm: Arm, seed: int) -> dict[str, Any]:
    """Return the result of an arm: its metrics, its training time, and the metrics of its bridge."""
    scores = read_scores(workspace.folder(arm.last, seed))[str(arm.at_step or END)]
    seconds, bridge = 0.0, {}
    for stage_run, steps in arm.chain:
        folder = workspace.folder(stage_run, seed) / stage_run.stage
        record = read_training(folder)["stages"][-1]
        seconds += record["seconds"] * steps / record["steps"]
        if stage_run.stage == "bridge":
            log = read_run(folder.parent)["stages"]["bridge"]["log"]
            last = {name: value for line in log if line["step"] <= steps for name, value in line.items()}
            bridge = {name: last[name] for name in BRIDGE_METRICS if name in last}
    means = {name: sum(each[name] for each in scores.values()) / len(scores) for name in ("recall@1", "mrr")}
    return {"seed": seed, **means, "directions": scores, "seconds": seconds, "bridge": bridge}
