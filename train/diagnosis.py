"""Measure a checkpoint after training: what ``<EOS>`` carries of an image, and the geometry of its embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.model.backbone import load_backbone, read_config
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.loading import find_device, load_model
from cocoa_embed.model.training_record import read_run, read_training, run_of
from cocoa_embed.train.data.broken_rows import unbroken
from cocoa_embed.train.data.caption_rows import read_image_folder
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.oom import is_out_of_memory
from cocoa_embed.train.plan.stage_rows import read_stages
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.bridge.probe import MATCHING_IMAGE, NO_IMAGE, SHUFFLED_IMAGE, bridge_probe
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.contrastive.model import embedding_probe
from cocoa_embed.train.stages.probe import pictured_rows

ROWS = 64
"""Rows of ``--data`` that are measured by default."""

ROWS_AT_ONCE = 8

MASKED_TOKENS = (MATCHING_IMAGE, SHUFFLED_IMAGE, NO_IMAGE)


@dataclass(frozen=True)
class Diagnosis:
    """The metrics of a checkpoint; as a dictionary, the JSON document of ``cocoa-embed diagnose``.

    :param rows: The number of rows.
    :param source: The origin of the rows.
    :param held_out_by: The stage that held the rows out of its training; None for rows of ``--data``.
    :param seen_by: The stages before it that were trained on the same data.
    :param masked_tokens: Accuracy on masked tokens, under the names of the bridge's log. None if the checkpoint has no
        language-model head that predicts a token from the state before it, or if its embedding is not ``<EOS>``.
    :param geometry: The metrics of ``geometry``.
    """

    checkpoint: str
    rows: int
    source: str
    held_out_by: str | None
    seen_by: list[str]
    masked_tokens: dict[str, float] | None
    geometry: dict[str, float]


def diagnose(
    checkpoint: Path, *, data: Path | None = None, rows: int | None = None, device: str | None = None
) -> Diagnosis:
    """Measure a checkpoint of a run's stage, or an exported model.

    :param data: An image folder; by default the rows that the checkpoint's run held out of training.
    :param rows: The most rows to measure on; by default all rows held out, or ``ROWS`` of ``data``.
    :param device: The torch device; None takes the fastest.
    :raises UsageError: If the device cannot be used, or ``rows`` is below two.
    :raises CocoaError: If the folder is not a checkpoint, its weights are broken, or there are fewer than two images.
    """
    if rows is not None and rows < 2:
        raise UsageError(f"--rows is {rows}; at least two are needed, because images are swapped between rows.")
    training = read_training(checkpoint)
    recipe = Recipe.parse(training["recipe"], source=str(checkpoint))
    last = training["stages"][-1]["stage"] if training["stages"] else None
    if data is None:
        held_out_by, held_out, seen_by = held_out_rows(checkpoint)
        chosen, source = held_out[:rows], f"rows that the {held_out_by} stage held out of its training"
    else:
        chosen = pictured_rows(RowTable.of(read_image_folder(data, limit=rows or ROWS)), rows or ROWS, recipe.seed)
        held_out_by, seen_by, source = None, [], f"first rows of {printable(data)}"
        if not chosen:
            raise CocoaError(
                f"{printable(data)} has one image; at least two are needed, because images are swapped between rows."
            )
    device = find_device(device)
    try:
        metrics = _measure(checkpoint, recipe, last, chosen, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CocoaError(
            f"{printable(checkpoint)} does not fit into the memory of {device} with {ROWS_AT_ONCE} rows at once "
            f"({one_line(error)}); give another --device."
        ) from error
    masked_tokens = {name: metrics.pop(name) for name in MASKED_TOKENS if name in metrics}
    if not metrics:
        raise CocoaError(f"{printable(checkpoint)} makes embeddings that are not finite; its weights are broken.")
    return Diagnosis(str(checkpoint), len(chosen), source, held_out_by, seen_by, masked_tokens or None, metrics)


def held_out_rows(checkpoint: Path) -> tuple[str, list[Row], list[str]]:
    """Return the stage of a checkpoint's run that held rows out, the rows, and earlier stages trained on the same data.

    :raises CocoaError: If no rows were held out, or the data are missing or have changed since.
    """
    run = run_of(checkpoint)
    if run is None:
        raise CocoaError(
            f"{printable(checkpoint)} does not belong to a training run, so no rows were held out; give --data FOLDER."
        )
    record = read_run(run)
    holding = {name: entry for name, entry in record["stages"].items() if entry.get("held_out", {}).get("rows")}
    if not holding:
        raise CocoaError(f"No stage of {printable(run)} held rows out of its training; give --data FOLDER.")
    stage, entry = next(iter(holding.items()))
    try:
        recipe = Recipe.parse(record["recipe"], source=str(run))
        read = read_stages(recipe, [stage])[stage]
    except CocoaError as error:
        raise CocoaError(
            f"The data of stage {stage} of {printable(run)} cannot be read ({one_line(error)}); give --data FOLDER."
        ) from error
    if read.rows.fingerprint != entry["fingerprint"]:
        raise CocoaError(
            f"The rows of stage {stage} have changed since the run in {printable(run)} (then {entry['rows']}, now "
            f"{read.rows.counts}), so the rows that it held out are unknown; give --data FOLDER."
        )
    rows = read.rows.select(entry["held_out"]["rows"])
    return stage, unbroken(rows, recipe.data_of(stage).on_bad_row), entry["held_out"]["seen_by"]


def _measure(checkpoint: Path, recipe: Recipe, last: str | None, rows: Sequence[Row], device: str) -> dict[str, float]:
    config, stage = read_config(str(checkpoint)), recipe.stages.get(last or "")
    has_head = family_of(config).model_class.__name__ in (config.architectures or [])
    if not has_head or recipe.pooling != "eos" or (stage and not stage.predicts_next):
        # The head, if there is one (not after the contrastive stage), does not predict through <EOS>.
        model = load_model(checkpoint, device).eval()
        return embedding_probe(model, rows, ROWS_AT_ONCE)(model)
    backbone = load_backbone(str(checkpoint), bidirectional=recipe.bidirectional)
    section = recipe.bridge or BridgeSettings(steps=1, batch_size=ROWS_AT_ONCE)
    probe = bridge_probe(
        BridgeCollator(backbone.processor, recipe.seed, section.mask_ratio, section.split),
        rows,
        prompts=recipe.prompts.model_dump(),
        batch_size=ROWS_AT_ONCE,
    )
    return probe(BridgeModel(backbone.model, eos_attends_to_b=section.eos_attends_to_b).to(device))
