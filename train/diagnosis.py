"""What a checkpoint's ``<EOS>`` carries and how its embeddings lie, measured outside of training."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.util import get_device_name

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.model.backbone import SUPPORTED, load_backbone, read_config
from cocoa_embed.model.loading import load_model
from cocoa_embed.model.training_record import read_training
from cocoa_embed.train.data.mixture import ReadRows, read_rows
from cocoa_embed.train.data.rows import Row, RowImage, read_image_folder
from cocoa_embed.train.loop.oom import is_out_of_memory
from cocoa_embed.train.plan.checks import DATA_FILE
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.run_report.finished_run import read_stage_rows, run_of
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel, bridge_probe
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.contrastive.trainer import embedding_probe
from cocoa_embed.train.stages.probe import MATCHING_IMAGE, NO_IMAGE, SHUFFLED_IMAGE, pictured_rows

ROWS = 64
"""How many rows are measured where nothing else is asked for."""

ROWS_AT_ONCE = 8

HIDDEN_TOKENS = (MATCHING_IMAGE, SHUFFLED_IMAGE, NO_IMAGE)


@dataclass(frozen=True)
class ChosenRows:
    """Rows to measure a checkpoint on.

    :param rows: Two or more, with different images.
    :param place: Where they are from, as people are told.
    :param kept_out: They are those that the recipe's bridge keeps out of its training.
    :param trained_on: By each stage behind the checkpoint, how many of the rows have an image that it was trained on;
        None where its data cannot be read any more.
    """

    rows: list[Row]
    place: str
    kept_out: bool
    trained_on: dict[str, int | None]


@dataclass(frozen=True)
class Diagnosis:
    """What was measured of a checkpoint.

    :param chosen: The rows that it was measured on.
    :param hidden_tokens: The shares of hidden tokens told right, by their names in the bridge's log; None where the
        checkpoint has no language-model head.
    :param geometry: The figures of ``geometry``.
    """

    checkpoint: Path
    chosen: ChosenRows
    hidden_tokens: dict[str, float] | None
    geometry: dict[str, float]

    def document(self) -> dict[str, Any]:
        """Return it as programs read it."""
        return {
            "checkpoint": str(self.checkpoint),
            "rows": len(self.chosen.rows),
            "from": self.chosen.place,
            "kept_out": self.chosen.kept_out,
            "trained_on": self.chosen.trained_on,
            "hidden_tokens": self.hidden_tokens,
            "geometry": self.geometry,
        }


def diagnose(
    checkpoint: Path, *, data: Path | None = None, rows: int | None = None, device: str | None = None
) -> Diagnosis:
    """Measure a checkpoint of a run's stage, or an exported model.

    :param data: An image folder; by default, the rows are those that the checkpoint's own recipe keeps out of its
        bridge.
    :param rows: The most rows to measure; by default all that were kept out, or ``ROWS`` of ``data``.
    :param device: The torch device; None takes the fastest there is.
    :raises UsageError: If there is no such device, or fewer than two rows are asked for.
    :raises CocoaError: If the folder is no checkpoint, there are not two images to measure it on, or it is broken.
    """
    if rows is not None and rows < 2:
        raise UsageError(f"--rows is {rows}; two are needed, as images are exchanged.")
    training = read_training(checkpoint)
    recipe = Recipe.parse(training["recipe"], source=str(checkpoint))
    chosen = choose_rows(checkpoint, training, recipe, data, rows)
    device = find_device(device)
    try:
        figures = _figures(checkpoint, recipe, chosen.rows, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CocoaError(
            f"{printable(checkpoint)} does not fit into the memory of {device} with {ROWS_AT_ONCE} rows at once "
            f"({one_line(error)}); give another --device."
        ) from error
    hidden_tokens = {name: figures.pop(name) for name in HIDDEN_TOKENS if name in figures}
    if not figures:
        raise CocoaError(f"{printable(checkpoint)} makes embeddings that are not finite; its weights are broken.")
    return Diagnosis(checkpoint, chosen, hidden_tokens or None, figures)


def find_device(device: str | None) -> str:
    """Return the name of a device that is there.

    :raises UsageError: If it is not.
    """
    name = device or get_device_name()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without it
        raise UsageError(f"--device {name} cannot be used ({one_line(error).split('. ')[0]}).") from error
    return name


def has_language_head(checkpoint: Path) -> bool:
    """Tell whether a checkpoint can predict tokens: stage 3 and an exported model cannot."""
    config = read_config(str(checkpoint))
    return SUPPORTED[config.model_type].__name__ in (config.architectures or [])


class RecipeRows:
    """The rows of a recipe's stages as training drew them; a stage's are read when they are first asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._read: dict[str, ReadRows] = {}

    def of(self, stage: str) -> ReadRows:
        """Return all rows of a stage.

        :raises CocoaError: If its data cannot be read.
        """
        if stage not in self._read:
            data = self.recipe.data_of(stage)
            self._read[stage] = read_rows(
                self.recipe.sources_of(stage),
                on_bad_row=data.on_bad_row,
                # A run that stops at bad rows has had none; one that leaves them out must have decoded its images.
                check_images=data.on_bad_row == "skip",
                seed=self.recipe.seed,
                progress=True,
                refuse=self.recipe.stages[stage].unusable,
            )
        return self._read[stage]

    def split(self, stage: str) -> tuple[list[Row], list[Row]]:
        """Return the rows of a stage that it keeps out of its training, and those that it trains on."""
        return self.recipe.stages[stage].held_out(self.of(stage).rows)


def choose_rows(
    checkpoint: Path, training: dict[str, Any], recipe: Recipe, data: Path | None, count: int | None
) -> ChosenRows:
    """Choose the rows to measure a checkpoint on.

    :param training: What ``read_training`` has read of the checkpoint.
    :param data: An image folder, instead of the bridge's own data.
    :param count: The most rows.
    :raises CocoaError: If the data cannot be read, or there are not two images in it.
    """
    of_recipe = RecipeRows(recipe)
    if data is None:
        rows = _kept_out_rows(checkpoint, of_recipe)[:count]
        place = "rows that the bridge keeps out of its training"
    else:
        rows = pictured_rows(read_image_folder(data, limit=count or ROWS), count or ROWS)
        place = f"the first rows of {printable(data)}"
        if not rows:
            raise CocoaError(f"{printable(data)} has one image; two are needed, as images are exchanged.")
    return ChosenRows(rows, place, kept_out=data is None, trained_on=_trained_on(rows, training, of_recipe))


def _kept_out_rows(checkpoint: Path, of_recipe: RecipeRows) -> list[Row]:
    name, bridge = printable(checkpoint), of_recipe.recipe.bridge
    if bridge is None:
        raise CocoaError(f"The recipe of {name} has no bridge, which would keep rows out; give --data FOLDER.")
    try:
        read = of_recipe.of("bridge")
    except CocoaError as error:
        raise CocoaError(
            f"The bridge's data of {name} cannot be used ({one_line(error)}); give --data FOLDER."
        ) from error
    _refuse_other_rows(checkpoint, read)
    rows, _ = of_recipe.split("bridge")
    if not rows:
        images = len({row.image for row in read.rows if row.image is not None})
        raise CocoaError(
            f"The bridge of {name} kept no rows out (probe_rows {bridge.probe_rows} of {images} images); "
            "give --data FOLDER."
        )
    return rows


def _refuse_other_rows(checkpoint: Path, read: ReadRows) -> None:
    """Check that a run's rows are still those that it was trained on; an exported model does not know them."""
    run = run_of(checkpoint)
    if run is None or not (run / DATA_FILE).is_file():
        return
    before = read_stage_rows(run).get("bridge")
    if before is not None and before.fingerprint != read.fingerprint:
        raise CocoaError(
            f"The bridge's rows have changed since the run of {printable(checkpoint)} (then {before.counts}, now "
            f"{read.counts}), so that the rows it kept out cannot be told; give --data FOLDER."
        )


def _trained_on(rows: Sequence[Row], training: dict[str, Any], of_recipe: RecipeRows) -> dict[str, int | None]:
    """Return for each stage behind a checkpoint how many of ``rows`` have an image that it was trained on."""
    stages, planned = [entry["stage"] for entry in training["stages"]], list(of_recipe.recipe.stages)
    own = planned[: planned.index(stages[-1]) + 1] if stages and stages[-1] in planned else []
    counts: dict[str, int | None] = {f"{stage} of an earlier run": None for stage in stages[: len(stages) - len(own)]}
    for stage in own:
        try:
            _, trained = of_recipe.split(stage)
        except CocoaError:
            counts[stage] = None
        else:
            seen = {_identity(image) for row in trained for image in row.images()}
            counts[stage] = sum(_identity(row.image) in seen for row in rows if row.image is not None)
    return counts


def _identity(image: RowImage) -> str:
    return os.path.realpath(image) if isinstance(image, Path) else str(image)


def _figures(checkpoint: Path, recipe: Recipe, rows: Sequence[Row], device: str) -> dict[str, float]:
    if not has_language_head(checkpoint):
        model = load_model(checkpoint, device).eval()
        return embedding_probe(model, rows, ROWS_AT_ONCE)(model)
    backbone = load_backbone(str(checkpoint), bidirectional=recipe.bidirectional)
    backbone.model.to(device)
    section = recipe.bridge or BridgeSettings(steps=1, batch_size=ROWS_AT_ONCE)
    probe = bridge_probe(
        BridgeCollator(backbone.processor, recipe.seed, section.mask_ratio),
        rows,
        prompts=recipe.prompts.model_dump(),
        batch_size=ROWS_AT_ONCE,
    )
    return probe(BridgeModel(backbone.model, eos_attends_to_b=section.eos_attends_to_b))
