"""Score the model of a run for its report, on pairs of one's own or on rows that it was trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoa_embed.encoder import Encoder
from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.evaluation.galleries import QueryGallery
from cocoa_embed.evaluation.items import Item
from cocoa_embed.evaluation.pairs import Pair, evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.export import build_sentence_transformer, read_training
from cocoa_embed.loading import load_model
from cocoa_embed.report.content import Gallery
from cocoa_embed.train import data
from cocoa_embed.train.collators import lacks_block_b
from cocoa_embed.train.finished_run import FinishedRun
from cocoa_embed.train.mixing import fingerprint, read_rows
from cocoa_embed.train.stored import StoredImage

OWN_ROWS = 200
"""Rows of a run's own data that its model is scored on where no other pairs are given."""


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs, and what to say of them.

    :param title: What they are.
    :param note: Sentences about them.
    :param trained_on: The model was trained on them, or on rows like them.
    """

    pairs: list[Pair]
    title: str
    note: str
    trained_on: bool


@dataclass(frozen=True)
class RunScores:
    """How the model of a run did on pairs.

    :param document: As :func:`cocoa_embed.evaluation.pairs.evaluate_pairs` returns it.
    """

    scored: ScoredPairs
    stage: str
    document: dict[str, Any]
    galleries: list[Gallery]


def score_run(run: FinishedRun, scored: ScoredPairs, device: str | None = None, *, progress: bool = False) -> RunScores:
    """Score the run's last checkpoint in both directions.

    :param device: The torch device; the fastest by default.
    :raises CocoaError: If the checkpoint cannot be loaded, or an item cannot be embedded.
    """
    last = run.results[-1]
    encoder = load_checkpoint(last.folder, device)
    encoder.name = f"{run.folder.name}/{last.stage}"
    gallery = QueryGallery()
    document = evaluate_pairs([encoder], scored.pairs, progress=progress, observe=gallery.observe)
    return RunScores(scored, last.stage, document, gallery.galleries())


def load_checkpoint(folder: Path, device: str | None = None) -> Encoder:
    """Load the checkpoint of any stage for encoding.

    :raises CocoaError: If it cannot be loaded.
    """
    if (folder / "modules.json").is_file():
        return Encoder(load_model(folder, device), str(folder))
    model = build_sentence_transformer(folder, prompts=read_training(folder)["recipe"]["prompts"])
    try:
        return Encoder(model if device is None else model.to(device), str(folder))
    except RuntimeError as error:
        raise CocoaError(f"the device {device!r} cannot be used ({error})") from error


def given_pairs(path: Path, images: Path | None) -> ScoredPairs:
    """Read pairs as ``cocoa-embed eval pairs`` does.

    :raises CocoaError: If they cannot be read.
    """
    pairs = read_pairs(path, images)
    return ScoredPairs(pairs, f"{len(pairs):,} pairs of {printable(path)}", "", trained_on=False)


def own_pairs(run: FinishedRun, tell: Callable[[str], None] | None = None) -> ScoredPairs:
    """Read the first :data:`OWN_ROWS` rows that the run's last stage was trained on.

    :param tell: Is told that rows are read, which takes a while where there are many.
    :raises CocoaError: If they cannot be read any more, or there are too few to tell apart.
    """
    stage = run.results[-1].stage
    known = run.rows.get(stage)
    if known is None or known.sources is None:
        raise CocoaError("the run does not tell where its rows are from")
    if tell is not None:
        tell(f"reading the rows of the {stage} stage; --pairs would give others")
    read = read_rows(
        known.sources,
        on_bad_row="skip",
        check_images=False,
        seed=run.recipe.get("seed", 0),
        refuse=lacks_block_b if stage == "bridge" else None,
    )
    left_out = {(row.subset, row.source) for row in run.bad}
    rows = [row for row in read.rows if (row.subset, row.source) not in left_out]
    is_same = fingerprint(rows) == known.fingerprint
    first = rows[:OWN_ROWS]
    title = f"The first {len(first)} rows that the {stage} stage was trained on"
    note = (
        "No other pairs were given, so these are rows that the model has been trained on: they show whether it has"
        " learned them, and say nothing of how it does on others. For that, write the report with --pairs."
    )
    if not is_same:
        title = f"The first {len(first)} rows of what the {stage} stage's data are now"
        note += " The data are no longer as they were when the run began: some of these rows may be others."
    return ScoredPairs([_pair(row) for row in first], title, note, trained_on=True)


def _pair(row: data.Row) -> Pair:
    return Pair(_item(row.query), _item(row.positive))


def _item(item: data.Item) -> Item:
    image: str | bytes | None = None
    if isinstance(item.image, StoredImage):
        image = item.image.read()
    elif item.image is not None:
        image = str(item.image.absolute())
    return Item(item.text or None, image)


def direction_headlines(document: dict[str, Any]) -> Sequence[tuple[str, float, list[float], int]]:
    """Return each direction with its recall@1, that figure's interval, and how many documents were searched."""
    return [
        (way, document["subsets"][way]["recall@1"], document["intervals"][way]["recall@1"], counts["documents"])
        for way, counts in document["counts"].items()
    ]
