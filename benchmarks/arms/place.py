"""Where the ablation's data and weights are, and what its arms have in common."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from arms.families import families
from arms.grid import Sizes, StageRun
from cocoa_embed.demo.scenes import write_image_folder, write_scenes
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.folders import claim_folder, write_whole
from cocoa_embed.images.find_files import METADATA_FILE
from cocoa_embed.train import Recipe
from cocoa_embed.train.loop.snapshots import snapshot_folder
from cocoa_embed.train.plan.checks import NOT_LEARNED
from cocoa_embed.train.plan.dry_run import plan
from cocoa_embed.train.recipe import STAGES

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows has no such lock
    flock = None

MARKER = ".cocoa-ablation"
DIGITS = 10
LEARNING = 1
"""To be raised where the code changes what a stage learns: weights of before are not taken for those of after."""

OWN_KEYS = ("seed", "name", "backbone", "data.folder", "contrastive.data", "bridge.probe")
"""What the ablation sets itself, beside each stage's steps and schedules."""


@dataclass(frozen=True)
class Data:
    """Image folders: what warm-up and bridge see, where contrastive pairs are from, and what is measured on."""

    training: Path
    pairs: Path
    held_out: Path

    def digest(self) -> str:
        """Return what tells these data from others: the captions and names of all images, by their digest."""
        content = hashlib.sha256()
        for folder in (self.training, self.pairs, self.held_out):
            content.update((folder / METADATA_FILE).read_bytes())
        return content.hexdigest()


@dataclass(frozen=True)
class Given:
    """Image folders of the user's own, with ``metadata.jsonl``: to train on, and to measure on."""

    training: Path
    held_out: Path


@dataclass(frozen=True)
class Place:
    """The folder of an ablation.

    :param base: The recipe that all stages are taken from, a name or a file.
    :param settings: What is changed in it for all arms, as ``key.sub=value``.
    :param given: Image folders of the user's own; drawn scenes if None, others for each seed.
    """

    work: Path
    sizes: Sizes
    base: str
    settings: tuple[str, ...] = ()
    given: Given | None = None

    def __post_init__(self) -> None:
        """Check that nothing is set that the ablation sets itself.

        :raises UsageError: If it is.
        """
        for setting in self.settings:
            key = setting.partition("=")[0]
            if key.startswith(OWN_KEYS) or key.endswith((".steps", ".epochs", ".snapshot_steps", ".group_by_length")):
                raise UsageError(f"--set {setting}: the ablation sets {key} itself; leave it out.")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, or go on in it, as the only one.

        :raises CocoaError: If it holds something else, or another ablation is at work in it.
        """
        if not (self.work / MARKER).is_file():
            claim_folder(self.work, marker=MARKER)
        with (self.work / MARKER).open("a") as lock:
            try:
                if flock is not None:
                    flock(lock, LOCK_EX | LOCK_NB)
            except OSError as error:
                raise CocoaError(f"another ablation is at work in {self.work}; wait for it or give --work") from error
            yield

    def data(self, seed: int) -> Data:
        """Return the data of a seed; scenes are drawn where they are not there yet."""
        if self.given is not None:
            return self._given_data(self.given)
        folder = self.work / "data" / f"scenes-{self.sizes.training}-{self.sizes.held_out}-seed-{seed}"
        data = Data(folder / "train", folder / "pairs", folder / "held-out")
        if not (folder / "drawn").is_file():
            write_image_folder(data.training, "train", self.sizes.kept_out + self.sizes.training, seed)
            _link_all_but_the_first(data.training, data.pairs, self.sizes.kept_out)
            generator = random.Random(f"{seed}/families")
            write_scenes(data.held_out, islice(families(generator), self.sizes.held_out), generator)
            (folder / "drawn").touch()
        return data

    def _given_data(self, given: Given) -> Data:
        content = hashlib.sha256(str(given.training.resolve()).encode())
        content.update((given.training / METADATA_FILE).read_bytes())
        pairs = self.work / "data" / f"pairs-{self.sizes.kept_out}-{content.hexdigest()[:DIGITS]}"
        if not (pairs / METADATA_FILE).is_file():
            _link_all_but_the_first(given.training, pairs, self.sizes.kept_out)
        return Data(given.training, pairs, given.held_out)

    def key(self, stage_run: StageRun, seed: int) -> str:
        """Return a name for a stage: another wherever anything is different that leads to it."""
        start = None if stage_run.start is None else f"{self.key(stage_run.start, seed)} {stage_run.at_step}"
        recipe = _learned(self.recipe(stage_run, seed, backbone=start).model_dump(mode="json"))
        content = [recipe, self.data(seed).digest(), LEARNING]
        return f"{stage_run.stage}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:DIGITS]}"

    def folder(self, stage_run: StageRun, seed: int) -> Path:
        """Return where a stage is trained."""
        return self.work / f"seed-{seed}" / self.key(stage_run, seed)

    def start_folder(self, stage_run: StageRun, seed: int) -> str | None:
        """Return the weights that a stage starts from; None for the recipe's backbone."""
        if stage_run.start is None:
            return None
        folder = self.folder(stage_run.start, seed) / stage_run.start.stage
        return str(folder if stage_run.at_step is None else snapshot_folder(folder, stage_run.at_step))

    def recipe(self, stage_run: StageRun, seed: int, *, backbone: str | None) -> Recipe:
        """Return the recipe of one stage alone.

        :param backbone: Where it starts; None for the recipe's own.
        """
        data = self.data(seed)
        common = [
            f"data.folder={json.dumps(str(data.training))}",
            f"contrastive.data.folder={json.dumps(str(data.pairs))}",
            f"seed={seed}",
            f"bridge.probe_rows={self.sizes.kept_out}",
            f"bridge.probe_steps={min(self.sizes.kept_steps.values())}",
            # So that weights kept on the way are those of a shorter stage.
            *(f"{stage}.schedule=constant_with_warmup" for stage in ("bridge", "contrastive")),
            *(f"{stage}.group_by_length=false" for stage in ("warmup", "bridge")),
            *(f"{stage}=null" for stage in STAGES if stage != stage_run.stage),
            f"{stage_run.stage}.epochs=null",
            f"{stage_run.stage}.adapter=null",
            f"{stage_run.stage}.steps={stage_run.steps}",
        ]
        start = [] if backbone is None else [f"backbone={json.dumps(backbone)}"]
        return Recipe.load(self.base, [*self.settings, *common, *stage_run.settings, *start])

    def recipe_of(self, stage: str) -> Recipe:
        """Return the recipe of a stage as all arms have it."""
        limit = (f"contrastive.data.limit={self.sizes.pairs}",) if stage == "contrastive" else ()
        return self.recipe(StageRun(stage, 1, limit), 0, backbone=None)

    def batch_sizes(self) -> dict[str, int]:
        """Return the rows of a step of each stage."""
        return {stage: self.recipe_of(stage).stages[stage].settings.batch_size for stage in STAGES}

    def mask_ratio(self) -> float:
        """Return the bridge's mask ratio where it is not what is compared."""
        bridge = self.recipe_of("bridge").bridge
        assert bridge is not None
        return bridge.mask_ratio

    def flops_per_row(self) -> dict[str, float]:
        """Return the floating-point operations of a row of each stage, as a run with ``--dry-run`` tells them."""
        planned = [plan(self.recipe_of(stage), self.work / "plan", progress=False).stages[0] for stage in STAGES]
        return {stage.stage: stage.flops / stage.steps / stage.batch_size for stage in planned}


def _learned(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without what may differ between two machines that learn the same."""
    return {
        key: _learned(value) if isinstance(value, dict) else value
        for key, value in recipe.items()
        if key not in NOT_LEARNED
    }


def _link_all_but_the_first(source: Path, target: Path, count: int) -> None:
    """Make an image folder of all images but the first ``count``, the files being the same where that is possible."""
    lines = (source / METADATA_FILE).read_text(encoding="utf-8-sig").split("\n")
    named = [(json.loads(line)["file_name"], line) for line in lines if line.strip()]
    names = list(dict.fromkeys(name for name, _ in named))
    first, others = set(names[:count]), names[count:]
    for name in others:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if not (target / name).exists():
            try:
                os.link(source / name, target / name)
            except OSError:  # on another disk
                shutil.copyfile(source / name, target / name)
    write_whole(target / METADATA_FILE, "".join(f"{line}\n" for name, line in named if name not in first))
