"""What a reconstruction stage leaves beside its weights to be looked at: a few rows, and what it made of them."""

import base64
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from torch.distributed.fsdp import register_fsdp_forward_method

from cocoa_embed.errors import CocoaError, ImageError, one_line, printable
from cocoa_embed.images.load import decode_image
from cocoa_embed.report.content import BridgeMask, PatchReconstruction, TokenReconstruction
from cocoa_embed.report.figures import data_uri
from cocoa_embed.train.data.rows import Row, numbered
from cocoa_embed.train.loop.batch_facts import Batch, DescribedBatches
from cocoa_embed.train.loop.checkpoints import write_json
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.settings import ReconstructionSettings, StageSettings
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.probe import first_of_images, hold_out_rows
from cocoa_embed.train.stages.reconstructions import bridge_reconstructions, warmup_reconstructions
from cocoa_embed.train.stages.warmup.model import WarmupModel

SAMPLES_FILE = "samples.json"
"""In the folder of a reconstruction stage: its samples, the images inside as data URIs."""

SAMPLE_ROWS = 8

Result = TypeVar("Result")
Value = TypeVar("Value")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """What a stage has made of some rows.

    :param kept_out: The stage was not trained on these rows.
    :param failure: Why there are none, where there should be some.
    """

    kept_out: bool = False
    patches: list[PatchReconstruction] = field(default_factory=list)
    tokens: list[TokenReconstruction] = field(default_factory=list)
    mask: BridgeMask | None = None
    failure: str | None = None


def leave_samples(trainer: CocoaTrainer, section: StageSettings, rows: Sequence[Row], folder: Path) -> None:
    """Write a reconstruction stage's ``SAMPLES_FILE`` into its folder; other stages have none.

    Every process calls it when the stage's weights are saved. The first makes the samples and writes them; where the
    weights are sharded, all run the model. Nothing is drawn from a generator that training uses. Samples that cannot be
    made (an image has gone, memory or disk is full) cost the run nothing: a warning says so, and the file says why, so
    that the report can. Only a failure inside a sharded model ends the run, as the other processes would wait for this
    one for ever; it can be resumed.

    :param rows: All rows of the stage.
    """
    if not isinstance(section, ReconstructionSettings):
        return
    is_writer, is_sharded = trainer.is_world_process_zero(), trainer.is_fsdp_enabled
    if not (is_writer or is_sharded):
        return
    chosen, kept_out = choose_rows(section, rows)
    batches, failure = _attempt(lambda: _collated(trainer, section, chosen))
    if is_sharded:
        failure = next(filter(None, gather_object([failure])), None)
    samples: Samples | None = None
    if failure is None and batches is not None:
        if is_sharded:
            samples = _made(trainer, batches, kept_out)
        else:
            samples, failure = _attempt(lambda: _made(trainer, batches, kept_out))
    if not is_writer:
        return
    if samples is not None:
        _, failure = _attempt(lambda: write_samples(folder, samples))
    if failure is not None:
        logger.warning("Samples for the report of %s cannot be made (%s).", printable(folder), failure)
        _attempt(lambda: write_samples(folder, Samples(failure=failure)))


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return what ``work`` returns, or why it failed."""
    try:
        return work(), None
    except CocoaError as error:
        return None, one_line(error)
    except Exception as error:  # noqa: BLE001  whatever is wrong with pictures, the weights took hours
        return None, f"{type(error).__name__}: {one_line(error)}"


def _collated(
    trainer: CocoaTrainer, section: ReconstructionSettings, rows: Sequence[Row]
) -> list[tuple[list[Row], Batch]]:
    """Return the rows in batches as large as those that a device trains on at once: what fits there fits here."""
    described = trainer.data_collator
    assert isinstance(described, DescribedBatches)
    of_device = max(1, section.batch_size // trainer.accelerator.num_processes)
    examples, size = numbered(rows), min(section.mini_batch_size or of_device, of_device)
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    return [([row for _, row in part], described.collate(part)) for part in parts]


def _made(trainer: CocoaTrainer, batches: Sequence[tuple[list[Row], Batch]], kept_out: bool) -> Samples:
    described, model = trainer.data_collator, trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(described, DescribedBatches)
    collate: Any = described.collate
    was_training = model.training
    register_fsdp_forward_method(model, "predict")  # gathers the weights as a forward pass would; else does nothing
    patches: list[PatchReconstruction] = []
    tokens: list[TokenReconstruction] = []
    masks: list[BridgeMask] = []
    try:
        with trainer.accelerator.autocast():
            for rows, batch in batches:
                if isinstance(model, WarmupModel):
                    pictures, words = warmup_reconstructions(model, collate, rows, batch)
                    patches += pictures
                else:
                    words, mask = bridge_reconstructions(model, collate, rows, batch)
                    masks.append(mask)
                tokens += words
    finally:
        model.train(was_training)
    return Samples(kept_out, patches, tokens, masks[0] if masks else None)


def choose_rows(section: ReconstructionSettings, rows: Sequence[Row]) -> tuple[list[Row], bool]:
    """Return the rows to show, and whether the stage was not trained on them.

    Of the bridge they are rows that it keeps out for its probe, where it does; otherwise the first with different
    images, or without any where no row has one.
    """
    if isinstance(section, BridgeSettings):
        kept_out, _ = hold_out_rows(rows, section.probe_rows)
        if kept_out:
            return kept_out[:SAMPLE_ROWS], True
    return first_of_images(rows, SAMPLE_ROWS) or list(rows[:SAMPLE_ROWS]), False


def write_samples(folder: Path, samples: Samples) -> None:
    """Write ``SAMPLES_FILE``, whole or not at all.

    :raises OSError: If it cannot be written.
    """
    mask = samples.mask
    write_json(
        folder / SAMPLES_FILE,
        {
            "kept_out": samples.kept_out,
            "failure": samples.failure,
            "patches": [
                {
                    "caption": each.caption,
                    "original": data_uri(each.original),
                    "masked": data_uri(each.masked),
                    "reconstructed": data_uri(each.reconstructed),
                }
                for each in samples.patches
            ],
            "tokens": [
                {
                    "stage": each.stage,
                    "tokens": each.tokens,
                    "hidden": each.hidden,
                    "predicted": each.predicted,
                    "image": None if each.image is None else data_uri(each.image),
                }
                for each in samples.tokens
            ],
            "mask": mask
            and {
                "allowed": ["".join(map(str, row)) for row in mask.allowed.astype(int).tolist()],
                "labels": mask.labels,
                "blocks": mask.blocks,
            },
        },
    )


def read_samples(folder: Path) -> Samples | None:
    """Read what ``write_samples`` wrote; None where nothing was, as in the folders of earlier versions.

    :raises CocoaError: If the file is broken.
    """
    file = folder / SAMPLES_FILE
    if not file.is_file():
        return None
    try:
        return _parsed(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImageError) as error:
        raise CocoaError(
            f"{printable(file)} is broken ({one_line(error)}); remove it to go on without the samples of the stage"
        ) from error


def _parsed(document: dict[str, Any]) -> Samples:
    mask, failure = document["mask"], document["failure"]
    return Samples(
        _of_type(bool, document["kept_out"], "kept_out"),
        [
            PatchReconstruction(
                original=_image(each["original"], f"patches[{number}].original"),
                masked=_image(each["masked"], f"patches[{number}].masked"),
                reconstructed=_image(each["reconstructed"], f"patches[{number}].reconstructed"),
                caption=_of_type(str, each["caption"], f"patches[{number}].caption"),
            )
            for number, each in enumerate(document["patches"])
        ],
        [_tokens(each, f"tokens[{number}]") for number, each in enumerate(document["tokens"])],
        None if mask is None else _mask(mask),
        None if failure is None else _of_type(str, failure, "failure"),
    )


def _tokens(each: dict[str, Any], place: str) -> TokenReconstruction:
    return TokenReconstruction(
        tokens=_list_of(str, each["tokens"], f"{place}.tokens"),
        hidden=_list_of(bool, each["hidden"], f"{place}.hidden"),
        predicted=_list_of(str, each["predicted"], f"{place}.predicted"),
        stage=_of_type(str, each["stage"], f"{place}.stage"),
        image=None if each["image"] is None else _image(each["image"], f"{place}.image"),
    )


def _mask(mask: dict[str, Any]) -> BridgeMask:
    rows = _list_of(str, mask["allowed"], "mask.allowed")
    return BridgeMask(
        np.array([[cell == "1" for cell in row] for row in rows]),
        _list_of(str, mask["labels"], "mask.labels"),
        _list_of(str, mask["blocks"], "mask.blocks"),
    )


def _of_type(kind: type[Value], value: object, place: str) -> Value:
    if not isinstance(value, kind):
        raise TypeError(f"{place} is {json.dumps(value)[:40]}, a {kind.__name__} is expected")
    return value


def _list_of(kind: type[Value], values: object, place: str) -> list[Value]:
    return [_of_type(kind, value, f"{place}[{number}]") for number, value in enumerate(_of_type(list, values, place))]


def _image(uri: object, place: str) -> Image.Image:
    """Return the image of a data URI; it was written by us, and is decoded as any other image is."""
    try:
        data = base64.b64decode(_of_type(str, uri, place).partition(",")[2], validate=True)
    except ValueError as error:
        raise ValueError(f"{place}: {one_line(error)}") from error
    return decode_image(data, place)[0]
