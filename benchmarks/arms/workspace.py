"""The folder of an ablation: its data, and the recipe and the folder of each stage."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from arms.families import families
from arms.grid import MOCA, MOCA_SETTINGS, Grid, Group, Sizes, StageRun
from arms.photos import SETTINGS, PhotoGrid, PhotoSizes
from cocoa_embed.data.image_folder import METADATA_FILE
from cocoa_embed.demo.photographs import link_or_copy
from cocoa_embed.demo.scenes import write_image_folder, write_scenes
from cocoa_embed.errors import UsageError
from cocoa_embed.folders import claim_folder, only_writer, write_atomically
from cocoa_embed.train import Recipe
from cocoa_embed.train.loop.checkpoints import snapshot_folder
from cocoa_embed.train.plan.checks import NOT_LEARNED
from cocoa_embed.train.plan.dry_run import plan
from cocoa_embed.train.recipe import STAGES
from cocoa_embed.train.timing import seconds_per_step

MARKER = ".cocoa-ablation"
DIGITS = 10
MOCA_BASES = ("tiny", "photos")
"""Recipes with which MoCa is compared."""

VERSION = 1
"""Raise it when the code changes what a stage learns, so that older weights are not reused."""

RESERVED = ("seed", "name", "backbone", "data.folder", "contrastive.data", "bridge.probe")
RESERVED_IN_A_STAGE = (".steps", ".epochs", ".snapshot_steps", ".group_by_length")
"""Settings that the ablation itself sets."""


@dataclass(frozen=True)
class Data:
    """The image folders of warm-up and bridge, of the contrastive pairs, and of the measurement."""

    training: Path
    pairs: Path
    held_out: Path

    def digest(self) -> str:
        """Return a digest of the file names and captions of all images."""
        content = hashlib.sha256()
        for folder in (self.training, self.pairs, self.held_out):
            content.update((folder / METADATA_FILE).read_bytes())
        return content.hexdigest()


@dataclass(frozen=True)
class UserFolders:
    """The user's image folders, with ``metadata.jsonl``: to train on, and to measure on."""

    training: Path
    held_out: Path


@dataclass(frozen=True)
class Workspace:
    """The folder of an ablation.

    :param base: The recipe of all stages, a name or a file.
    :param settings: Overrides of this recipe for all arms, as ``key.sub=value``.
    :param folders: The user's image folders; None for drawn scenes, different ones for each seed.
    :param backbone: The backbone that the first stage starts from; None for the recipe's.
    :param alone_learning_rate: The learning rate of contrastive learning alone, whose best rate may differ; None for
        the recipe's.
    """

    work: Path
    sizes: Sizes
    base: str
    settings: tuple[str, ...] = ()
    folders: UserFolders | None = None
    backbone: str | None = None
    alone_learning_rate: float | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        :raises UsageError: If one is set by the ablation itself.
        """
        for setting in self.settings:
            key = setting.partition("=")[0]
            if key.startswith(RESERVED) or key.endswith(RESERVED_IN_A_STAGE):
                raise UsageError(f"--set {setting}: the ablation sets {key} itself; leave it out.")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder, or continue in it, and lock it.

        :raises CocoaError: If it holds something else, or another ablation writes to it.
        """
        with only_writer(self.work, marker=MARKER):
            if not (self.work / MARKER).is_file():
                claim_folder(self.work, marker=MARKER)
            yield

    def data(self, seed: int) -> Data:
        """Return the data of a seed, drawing scenes if they are missing."""
        if self.folders is not None:
            return self._user_data(self.folders)
        folder = self.work / "data" / f"scenes-{self.sizes.training}-{self.sizes.held_out}-seed-{seed}"
        data = Data(folder / "train", folder / "pairs", folder / "held-out")
        if not (folder / "drawn").is_file():
            write_image_folder(data.training, "train", self.sizes.probe_rows + self.sizes.training, seed)
            _link_all_but_the_first(data.training, data.pairs, self.sizes.probe_rows)
            generator = random.Random(f"{seed}/families")
            write_scenes(data.held_out, islice(families(generator), self.sizes.held_out), generator)
            (folder / "drawn").touch()
        return data

    def _user_data(self, folders: UserFolders) -> Data:
        if isinstance(self.sizes, PhotoSizes):
            return Data(folders.training, folders.training, folders.held_out)
        content = hashlib.sha256(str(folders.training.resolve()).encode())
        content.update((folders.training / METADATA_FILE).read_bytes())
        pairs = self.work / "data" / f"pairs-{self.sizes.probe_rows}-{content.hexdigest()[:DIGITS]}"
        if not (pairs / METADATA_FILE).is_file():
            _link_all_but_the_first(folders.training, pairs, self.sizes.probe_rows)
        return Data(folders.training, pairs, folders.held_out)

    def key(self, stage_run: StageRun, seed: int) -> str:
        """Return a name for a stage that depends on everything that its weights depend on."""
        start = None if stage_run.start is None else f"{self.key(stage_run.start, seed)} {stage_run.at_step}"
        recipe = _learned(self.recipe(stage_run, seed, backbone=start).model_dump(mode="json"))
        content = [recipe, self.data(seed).digest(), VERSION, *_weights(recipe["backbone"])]
        return f"{stage_run.stage}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:DIGITS]}"

    def folder(self, stage_run: StageRun, seed: int) -> Path:
        """Return the folder of a stage's run."""
        return self.work / f"seed-{seed}" / self.key(stage_run, seed)

    def start_folder(self, stage_run: StageRun, seed: int) -> str | None:
        """Return the weights that a stage starts from; None for the recipe's backbone."""
        if stage_run.start is None:
            return None
        folder = self.folder(stage_run.start, seed) / stage_run.start.stage
        return str(folder if stage_run.at_step is None else snapshot_folder(folder, stage_run.at_step))

    def recipe(self, stage_run: StageRun, seed: int, *, backbone: str | None) -> Recipe:
        """Return the recipe of one stage alone.

        :param backbone: The weights to start from; None for the recipe's backbone.
        """
        data, stage = self.data(seed), stage_run.stage
        common = [
            f"data.folder={json.dumps(str(data.training))}",
            f"contrastive.data.folder={json.dumps(str(data.pairs))}",
            f"seed={seed}",
            f"bridge.probe_rows={self.sizes.probe_rows}",
            f"bridge.probe_steps={min(self.sizes.snapshots.values())}",
            # So that a snapshot equals the result of a shorter stage.
            *(f"{name}.schedule=constant_with_warmup" for name in ("bridge", "contrastive")),
            *(f"{name}.group_by_length=false" for name in ("warmup", "bridge")),
            *(f"{name}=null" for name in STAGES if name != stage),
            *(f"{stage}.{setting}" for setting in ("epochs=null", "adapter=null", f"steps={stage_run.steps}")),
        ]
        start = [f"backbone={json.dumps(name)}" for name in (backbone or self.backbone,) if name]
        if stage == "contrastive" and stage_run.start is None and self.alone_learning_rate is not None:
            common.append(f"contrastive.learning_rate={self.alone_learning_rate}")
        return Recipe.load(self.base, [*self.settings, *common, *stage_run.settings, *start])

    @property
    def has_moca(self) -> bool:
        """Whether MoCa's settings apply: they are for a few recipes, and a mean is a single vector."""
        return self.base in MOCA_BASES and self.recipe(StageRun("warmup", 1), 0, backbone=None).eos_tokens == 1

    def grid(
        self, groups: Sequence[Group] | None = None, patterns: Sequence[str] = (), *, is_timed: bool = False
    ) -> Grid:
        """Return the arms to compare; a dry run measures what a row of each stage costs.

        :param groups: The groups of arms to run; None for all.
        :param patterns: Patterns of the labels of the arms to run; none for all.
        :param is_timed: Also time a few steps of each stage.
        """
        is_photos = isinstance(self.sizes, PhotoSizes)
        names = [stage for stage in STAGES if stage != MOCA or self.has_moca]
        if is_photos and (groups is None or "settings" in groups):
            names += SETTINGS
        of_stage = {"contrastive": (f"contrastive.data.limit={self.sizes.pairs}",), MOCA: MOCA_SETTINGS}
        varied = {name: (name,) * (name not in STAGES) for name in names}
        stages = {name: name.partition(".")[0] for name in names}
        runs = {name: StageRun(stages[name], 1, (*of_stage.get(stages[name], ()), *varied[name])) for name in names}
        recipes = {name: self.recipe(stage_run, 0, backbone=None) for name, stage_run in runs.items()}
        timed = seconds_per_step if is_timed else None
        plans = {
            name: plan(recipe, self.work / "plan", seconds_per_step=timed if name in STAGES else None).stages[0]
            for name, recipe in recipes.items()
        }
        return (PhotoGrid if is_photos else Grid)(
            self.sizes,  # type: ignore[arg-type]
            flops_per_row={name: each.flops / each.steps / each.batch_size for name, each in plans.items()},
            batch_sizes={name: each.batch_size for name, each in plans.items()},
            mask_ratio=recipes["bridge"].model_dump()["bridge"]["mask_ratio"],
            groups=groups,
            patterns=patterns,
            seconds_per_step={name: each.seconds_per_step or 0.0 for name, each in plans.items() if name in STAGES},
        )


@cache
def _weights(backbone: str) -> list[str]:
    """Return a digest of the weights in a folder that is not a stage of the ablation; for a name, an empty list."""
    content = hashlib.sha256()
    for file in sorted(Path(backbone).glob("*.safetensors")):
        content.update(file.read_bytes())
    return [content.hexdigest()] if Path(backbone).is_dir() else []


def _learned(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without the settings that do not affect what is learned."""
    return {
        key: _learned(value) if isinstance(value, dict) else value
        for key, value in recipe.items()
        if key not in NOT_LEARNED
    }


def _link_all_but_the_first(source: Path, target: Path, count: int) -> None:
    """Write an image folder with all images but the first ``count``, as hard links where possible."""
    lines = (source / METADATA_FILE).read_text(encoding="utf-8-sig").split("\n")
    named = [(json.loads(line)["file_name"], line) for line in lines if line.strip()]
    names = list(dict.fromkeys(name for name, _ in named))[count:]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if not (target / name).exists():
            link_or_copy(source / name, target / name)
    kept = set(names)
    write_atomically(target / METADATA_FILE, "".join(f"{line}\n" for name, line in named if name in kept))
