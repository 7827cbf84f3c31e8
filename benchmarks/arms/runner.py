"""Train and score the arms of a grid: each stage once, in processes side by side; what is finished stays so."""

import contextlib
import hashlib
import json
import random
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from arms.families import families
from arms.grid import Arm, Sizes, StageRun
from cocoa_embed.demo.scenes import write_image_folder, write_scenes
from cocoa_embed.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.pairs import METRICS, directions, score_queries
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.export import build_sentence_transformer, is_bidirectional, read_training
from cocoa_embed.folders import claim_folder, write_whole
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.kept_steps import kept_folder
from cocoa_embed.train.plan import plan
from cocoa_embed.train.recipe import STAGES

MARKER = ".cocoa-ablation"
SCORES = "scores.json"
END = "end"
DIGITS = 10

LEARNED = (
    "loss",
    "accuracy_right_image",
    "accuracy_shuffled_image",
    "accuracy_no_image",
    "alignment",
    "uniformity",
    "modality_gap",
    "effective_rank",
)
"""What the log of a bridge tells of the model that it leaves."""


@dataclass(frozen=True)
class Data:
    """Two image folders: what is trained on, and what retrieval is measured among."""

    training: Path
    held_out: Path


@dataclass(frozen=True)
class Laboratory:
    """Where everything is, and what all arms have in common.

    :param base: The recipe that all stages are taken from, a name or a file.
    :param given: Image folders of the user's own; drawn scenes if None, others for each seed.
    """

    work: Path
    sizes: Sizes
    base: str = "tiny"
    given: Data | None = None

    def open(self) -> None:
        """Make the folder, or go on in it.

        :raises CocoaError: If it holds something else.
        """
        if not (self.work / MARKER).is_file():
            claim_folder(self.work, marker=MARKER)

    def data(self, seed: int) -> Data:
        """Return the data of a seed; scenes are drawn where they are not there yet."""
        if self.given is not None:
            return self.given
        name = f"scenes-{self.sizes.training}-{self.sizes.held_out}-seed-{seed}"
        data = Data(self.work / "data" / name / "train", self.work / "data" / name / "held-out")
        finished = self.work / "data" / name / "drawn"
        if not finished.is_file():
            write_image_folder(data.training, "train", self.sizes.training, seed)
            generator = random.Random(f"{seed}/families")
            write_scenes(data.held_out, islice(families(generator), self.sizes.held_out), generator)
            finished.touch()
        return data

    def key(self, stage_run: StageRun) -> str:
        """Return a name for a stage and all that leads to it."""
        content = [self.base, self.sizes.settings, self.sizes.training, self.sizes.held_out]
        content += [
            [(each.stage, each.settings, steps, each.steps) for each, steps in stage_run.chain],
            str(self.given and self.given.training),
        ]
        return f"{stage_run.stage}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:DIGITS]}"

    def folder(self, stage_run: StageRun, seed: int) -> Path:
        """Return where a stage is trained."""
        return self.work / f"seed-{seed}" / self.key(stage_run)

    def recipe(self, stage_run: StageRun, seed: int) -> Recipe:
        """Return the recipe of one stage alone."""
        start = [] if stage_run.start is None else [f"backbone={json.dumps(str(self._start_folder(stage_run, seed)))}"]
        return Recipe.load(
            self.base,
            [
                f"data.folder={json.dumps(str(self.data(seed).training))}",
                f"seed={seed}",
                f"bridge.probe_steps={min(self.sizes.kept_steps.values())}",
                f"bridge.mask_ratio={self.sizes.mask_ratio}",
                *self.sizes.settings,
                *(f"{stage}=null" for stage in STAGES if stage != stage_run.stage),
                f"{stage_run.stage}.steps={stage_run.steps}",
                *stage_run.settings,
                *start,
            ],
        )

    def _start_folder(self, stage_run: StageRun, seed: int) -> Path:
        assert stage_run.start is not None
        folder = self.folder(stage_run.start, seed) / stage_run.start.stage
        return folder if stage_run.at_step is None else kept_folder(folder, stage_run.at_step)

    def flops_per_step(self) -> dict[str, float]:
        """Return the floating-point operations of a step of each stage, as a run with ``--dry-run`` tells them."""
        limit = (f"contrastive.data.limit={self.sizes.pairs}",)
        runs = [StageRun(stage, 1, limit if stage == "contrastive" else ()) for stage in STAGES]
        planned = [plan(self.recipe(each, 0), self.folder(each, 0), progress=False).stages[0] for each in runs]
        return {stage.stage: stage.flops / stage.steps for stage in planned}


@dataclass(frozen=True)
class Job:
    """A stage of one seed, as a process needs to know it.

    :param scored: The steps whose weights are scored, None for the last.
    """

    recipe: Recipe
    stage: str
    folder: Path
    held_out: Path
    scored: tuple[int | None, ...]


def jobs_of(laboratory: Laboratory, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[Path, tuple[Job, Path | None]]:
    """Return each stage that the arms need, by its folder, and the folder of the stage that it starts from."""
    jobs: dict[Path, tuple[Job, Path | None]] = {}
    for seed in seeds:
        scored: dict[str, set[int | None]] = {}
        needed: dict[str, StageRun] = {}
        for arm in arms:
            scored.setdefault(laboratory.key(arm.last), set()).add(arm.at_step)
            needed |= {laboratory.key(each): each for each in _with_starts(arm.last)}
        for key, each in needed.items():
            steps = sorted(scored.get(key, ()), key=lambda step: step or each.steps)
            folder = laboratory.folder(each, seed)
            before = None if each.start is None else laboratory.folder(each.start, seed)
            held_out = laboratory.data(seed).held_out
            jobs[folder] = Job(laboratory.recipe(each, seed), each.stage, folder, held_out, tuple(steps)), before
    return jobs


def _with_starts(stage_run: StageRun) -> list[StageRun]:
    return [*([] if stage_run.start is None else _with_starts(stage_run.start)), stage_run]


def run_jobs(jobs: dict[Path, tuple[Job, Path | None]], processes: int, threads: int) -> None:
    """Run each job when the one that it starts from is done, the longest first.

    :param threads: Of torch, in each process.
    :raises CocoaError: If a job fails, or the run is interrupted; what is finished stays.
    """
    waiting = dict(jobs)
    running: dict[Future[None], Path] = {}
    done: set[Path] = set()
    bar = tqdm(total=len(jobs), desc="stages", unit="stage")
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )
    try:
        while waiting or running:
            ready = [folder for folder, (_, before) in waiting.items() if before is None or before in done]
            for folder in sorted(ready, key=lambda folder: -_length(waiting[folder][0]))[: processes - len(running)]:
                running[pool.submit(train_and_score, waiting.pop(folder)[0])] = folder
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                finished.result()
                done.add(running.pop(finished))
                bar.update()
    except KeyboardInterrupt:
        raise CocoaError(
            f"interrupted; {len(done)} of {len(jobs)} stages are finished, the same command goes on"
        ) from None
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def _length(job: Job) -> int:
    section = job.recipe.section(job.stage)
    return (section.steps or 0) * section.batch_size


def train_and_score(job: Job) -> None:
    """Train a stage, going on where it was ended, and score its weights; nothing is done twice."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder.parent / f"{job.folder.name}.txt").open("a") as told, contextlib.redirect_stderr(told):
        (result,) = run(job.recipe, job.folder, resume=True)
        scores = read_scores(job.folder)
        for step in job.scored:
            if str(step or END) not in scores:
                checkpoint = result.folder if step is None else kept_folder(result.folder, step)
                scores[str(step or END)] = score(checkpoint, job.held_out)
                write_whole(job.folder / SCORES, json.dumps(scores, indent=2) + "\n")


def read_scores(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return what has been scored of a stage: metrics by direction, by step."""
    path = folder / SCORES
    return json.loads(path.read_text()) if path.is_file() else {}


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


def outcome(laboratory: Laboratory, arm: Arm, seed: int) -> dict[str, Any]:
    """Return what came out of an arm: its metrics, its training time, and what its bridge had learned."""
    scores = read_scores(laboratory.folder(arm.last, seed))[str(arm.at_step or END)]
    seconds, learned = 0.0, {}
    for stage_run, steps in arm.steps():
        folder = laboratory.folder(stage_run, seed) / stage_run.stage
        record = read_training(folder)["stages"][-1]
        seconds += record["seconds"] * steps / record["steps"]
        if stage_run.stage == "bridge":
            learned = _at_step(json.loads((folder / "log.json").read_text()), steps)
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
