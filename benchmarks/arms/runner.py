"""Train and score the arms of a grid: each stage once, in parallel processes, reusing finished stages."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from arms.grid import Arm, StageRun
from arms.summary import SCORED
from arms.workspace import Workspace
from cocoa_embed.cli.output import silence_libraries
from cocoa_embed.data import CaptionChoice
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.metrics import METRICS
from cocoa_embed.evaluation.pairs import directions, score_queries
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.folders import write_atomically
from cocoa_embed.model.training_record import read_run, read_training
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.loop.checkpoints import snapshot_folder

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
"""The metrics of the bridge's log whose last values are part of the results."""


@dataclass(frozen=True)
class Job:
    """A stage of one seed.

    :param before: The folder of the stage that this one starts from.
    :param scored: The steps whose weights are scored; None stands for the last.
    """

    recipe: Recipe
    stage: str
    folder: Path
    before: Path | None
    held_out: Path
    captions: CaptionChoice
    scored: tuple[int | None, ...]

    @property
    def output_file(self) -> Path:
        """The file for progress and messages of the training."""
        return self.folder.with_name(f"{self.folder.name}.txt")


def jobs_of(workspace: Workspace, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[Path, Job]:
    """Return the stages that the arms need, by folder."""
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
                captions="text" if workspace.folders is None else "captions",
                scored=tuple(sorted(scored.get(folder, ()), key=lambda step: step or each.steps)),
            )
    return jobs


def run_jobs(jobs: dict[Path, Job], processes: int, threads: int, publish: Callable[[], None] = lambda: None) -> None:
    """Run the jobs in order, each once the one that it starts from is done.

    :param threads: The number of torch's threads in each process.
    :param publish: Called after each job.
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
                for job in ready[: processes - len(running)]:
                    running[pool.submit(train_and_score, waiting.pop(job.folder))] = job
                for finished in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(finished)
                    _refuse_failure(finished, job)
                    done.add(job.folder)
                    bar.update()
                    publish()
        except KeyboardInterrupt:
            raise CocoaError("interrupted; finished stages stay, and the same command continues from there") from None
        finally:
            pool.shutdown(wait=not running, cancel_futures=True)


def _refuse_failure(finished: Future[None], job: Job) -> None:
    try:
        finished.result()
    except BrokenProcessPool as error:
        raise CocoaError(
            "a process was killed, most likely for lack of memory; lower --processes (finished stages are kept)"
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
    """Train a stage, or resume it, and score its weights, skipping what is already done."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.output_file.open("a") as output, contextlib.redirect_stderr(output):
        (result,) = run(job.recipe, job.folder, resume=True)
        for step in job.scored:
            if not scores_file(job.folder, step).is_file():
                checkpoint = result.folder if step is None else snapshot_folder(result.folder, step)
                scores = score(checkpoint, job.held_out, job.captions)
                write_atomically(scores_file(job.folder, step), json.dumps(scores))


def scores_file(folder: Path, step: int | None) -> Path:
    """Return the file with the scores after a step of a stage, or at its end."""
    return folder / f"scores-{step or END}.json"


def score(checkpoint: Path, held_out: Path, captions: CaptionChoice) -> dict[str, Any]:
    """Score a checkpoint on an image folder.

    :returns: ``metrics`` by direction, and ``images``, ``[images, 2, 4]``: the ``SCORED`` of each image, from its
        captions to it (their mean) and back.
    """
    both = directions(read_pairs(held_out, captions=captions))
    columns = [METRICS.index(name.replace("recall", "hit")) for name in SCORED]
    encoder = load_encoder(checkpoint)
    of_texts, of_images = (score_queries(encoder, each)[:, columns] for each in both)
    values = np.stack([[of_texts[texts].mean(axis=0) for texts in both[1].relevant], of_images], axis=1)
    means = zip(both, values.mean(axis=0).tolist(), strict=True)
    metrics = {way.name: dict(zip(SCORED, row, strict=True)) for way, row in means}
    return {"metrics": metrics, "images": values.round(6).tolist()}


def outcome(workspace: Workspace, arm: Arm, seed: int) -> dict[str, Any] | None:
    """Return the result of an arm: its metrics, its training time, and the metrics of its bridge; None if unfinished.

    With the user's folders, it also holds the scores of each of the ``images``, which are the same for all seeds.
    """
    scores = scores_file(workspace.folder(arm.last, seed), arm.at_step)
    if not scores.is_file():
        return None
    found = json.loads(scores.read_text(encoding="utf-8"))
    seconds, bridge = 0.0, {}
    for stage_run, steps in arm.chain:
        folder = workspace.folder(stage_run, seed) / stage_run.stage
        record = read_training(folder)["stages"][-1]
        seconds += record["seconds"] * steps / record["steps"]
        if stage_run.stage == "bridge":
            log = read_run(folder.parent)["stages"]["bridge"]["log"]
            last = {name: value for line in log if line["step"] <= steps for name, value in line.items()}
            bridge = {name: last[name] for name in BRIDGE_METRICS if name in last}
    means = {name: fmean(each[name] for each in found["metrics"].values()) for name in SCORED}
    images = {} if workspace.folders is None else {"images": found["images"]}
    return {"seed": seed, **means, "directions": found["metrics"], "seconds": seconds, "bridge": bridge, **images}
