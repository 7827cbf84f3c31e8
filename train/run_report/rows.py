"""The rows of a run, read again for its report: some to score its model on, all to tell what it was trained on."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.evaluation.pairs import Pair
from cocoa_embed.model.training_record import read_training
from cocoa_embed.report.series import PLATEAU, STAGE_TITLES
from cocoa_embed.train.data.mixture import fingerprint, read_rows, weigh
from cocoa_embed.train.data.readers import read_source
from cocoa_embed.train.data.rows import BadRow, Row
from cocoa_embed.train.run_report.finished_run import FinishedRun, StageRows
from cocoa_embed.train.settings import SourceSettings
from cocoa_embed.train.stages.bridge.collator import lacks_block_b
from cocoa_embed.train.stages.probe import hold_out_rows

OWN_ROWS = 200
"""Rows of a run's own data that its model is scored on where no other pairs are given."""

WHOLE_ROWS = 200_000
"""A stage with more rows is not read whole for a page."""


@dataclass(frozen=True)
class OwnRows:
    """The first rows of a stage.

    :param kept_out: The stage was not trained on them.
    :param is_same: They are those that the run had; None where that was not checked.
    """

    stage: str
    rows: list[Row]
    kept_out: bool
    is_same: bool | None


@dataclass(frozen=True)
class Overlap:
    """What of some pairs is among the rows of a run.

    :param pairs: How many of them have an image there, or where images cannot be compared a text.
    :param unknown: Why it cannot be told of some rows.
    """

    pairs: int
    unknown: list[str] = field(default_factory=list)


def read_own_rows(run: FinishedRun, tell: Callable[[str], None] | None = None) -> OwnRows:
    """Read the first ``OWN_ROWS`` rows of the run's last stage: of a bridge those that it kept out, if it did.

    Image folders and files are read whole, to see whether they are as they were. Of other data no more is read than is
    needed.

    :param tell: Is told that rows are read, which takes a while where there are many.
    :raises CocoaError: If they cannot be read any more, or not without the network.
    """
    stage = run.results[-1].stage
    known, sources = _known(run, stage)
    if tell is not None:
        tell(f"reading the rows of the {STAGE_TITLES[stage]} stage; --pairs would give others")
    kept_out = kept_out_images(run, stage)
    if not kept_out and not _is_checked(known, sources):
        return OwnRows(stage, _first_rows(run, stage, sources), kept_out=False, is_same=None)
    rows = _read_whole(run, stage, sources)
    is_same = fingerprint(rows) == known.fingerprint
    held_out, trained = hold_out_rows(rows, kept_out)
    return OwnRows(stage, (held_out or trained)[:OWN_ROWS], bool(held_out), is_same)


def kept_out_images(run: FinishedRun, stage: str) -> int:
    """Return how many images a finished stage kept out of its training, with their rows: those of its probe."""
    result = next((result for result in run.results if result.stage == stage), None)
    is_probed = stage == "bridge" and result is not None and PLATEAU[0] in result.final
    return int(run.recipe[stage].get("probe_rows", 0)) if is_probed else 0


def draws(run: FinishedRun, stage: str) -> tuple[int, bool]:
    """Return how many rows a finished stage has drawn at most, and whether that is each of its rows at least once."""
    result = next(result for result in run.results if result.stage == stage)
    section = run.recipe[stage]
    drawn = result.steps * int(section["batch_size"])
    ways = 2 if stage == "contrastive" and section.get("directions") == "both" else 1
    return drawn, drawn >= ways * result.rows


def earlier_stages(run: FinishedRun) -> list[str]:
    """Return the stages that the run's weights had been through before it began; none where no stage is finished."""
    if not run.results:
        return []
    stages = read_training(run.results[-1].folder, needs_weights=False)["stages"]
    return [str(each["stage"]) for each in stages[: -len(run.results)]]


def before_the_bridge(run: FinishedRun) -> str:
    """Return what to say of the rows that the bridge keeps out: whether what came before was trained on them."""
    earlier = earlier_stages(run)
    if "warmup" in [result.stage for result in run.results]:
        first, second = (run.rows.get(stage) for stage in ("warmup", "bridge"))
        if first is None or second is None or first.sources is None or second.sources is None:
            return "The warm-up before it may have been trained on them."
        if _places(first.sources) & _places(second.sources):
            drew = "was trained on" if draws(run, "warmup")[1] else "draws its training from"
            return (
                f"The warm-up before it {drew} the same data, these rows among them: only the bridge leaves them out."
            )
        if not earlier:
            return "The warm-up before it was trained on other data."
    if earlier:
        titles = " and ".join(dict.fromkeys(STAGE_TITLES.get(stage, stage) for stage in earlier))
        return f"What came before this run ({titles}) may have been trained on them."
    return ""


def overlap(run: FinishedRun, pairs: Sequence[Pair]) -> Overlap:
    """Return how many pairs are among the rows that the run's stages draw from.

    Images are compared by where their files really are, not by their pixels.
    """
    unknown = [f"the {STAGE_TITLES.get(stage, stage)} stage before this run" for stage in earlier_stages(run)]
    images: set[str] = set()
    texts: set[str] = set()
    for result in run.results:
        try:
            rows = _trained_rows(run, result.stage)
        except CocoaError as error:
            unknown.append(f"the {STAGE_TITLES[result.stage]} stage ({one_line(error).rstrip('.')})")
            continue
        items = [item for row in rows for item in row.items()]
        images |= {os.path.realpath(item.image) for item in items if isinstance(item.image, Path)}
        texts |= {item.text for item in items if item.text}
    return Overlap(sum(_is_among(pair, images, texts) for pair in pairs), unknown)


def _is_among(pair: Pair, images: set[str], texts: set[str]) -> bool:
    files = [item.image for item in pair if isinstance(item.image, str)]
    if files and images:
        return any(os.path.realpath(file) in images for file in files)
    return any(item.text in texts for item in pair if item.text)


def _trained_rows(run: FinishedRun, stage: str) -> list[Row]:
    known, sources = _known(run, stage)
    if sum(known.counts.values()) > WHOLE_ROWS:
        raise CocoaError(f"it has {sum(known.counts.values()):,} rows, which takes long")
    rows = _read_whole(run, stage, sources)
    return hold_out_rows(rows, kept_out_images(run, stage))[1]


def _known(run: FinishedRun, stage: str) -> tuple[StageRows, dict[str, SourceSettings]]:
    """Return what is known of a stage's rows.

    :raises CocoaError: If that does not suffice to read them from this machine's disk.
    """
    known = run.rows.get(stage)
    if known is None or known.sources is None:
        raise CocoaError("the run does not tell where its rows are from")
    for source in known.sources.values():
        name = source.hub or source.mmeb
        if name is not None and not Path(name).is_dir():
            raise CocoaError(f"its rows are of the data set {printable(name)}, and no network is opened for a page")
    return known, known.sources


def _is_checked(known: StageRows, sources: Mapping[str, SourceSettings]) -> bool:
    is_quick = all(source.folder is not None or source.file is not None for source in sources.values())
    return is_quick and sum(known.counts.values()) <= WHOLE_ROWS


def _read_whole(run: FinishedRun, stage: str, sources: Mapping[str, SourceSettings]) -> list[Row]:
    read = read_rows(
        sources,
        on_bad_row="skip",
        check_images=False,
        seed=run.recipe.get("seed", 0),
        refuse=lacks_block_b if stage == "bridge" else None,
        known_bad=run.bad_of(stage),
    )
    return read.rows


def _first_rows(run: FinishedRun, stage: str, sources: Mapping[str, SourceSettings]) -> list[Row]:
    bad: list[BadRow] = []
    known_bad = run.bad_of(stage)
    left_out = {(row.subset, row.source) for row in known_bad}

    def of_source(name: str, source: SourceSettings) -> list[Row]:
        if source.weight < 1:
            rows = weigh(read_source(name, source, bad), source.weight, seed=run.recipe.get("seed", 0), subset=name)
        else:
            limit = min(OWN_ROWS + len(known_bad), source.limit or OWN_ROWS + len(known_bad))
            rows = read_source(name, source.model_copy(update={"limit": limit}), bad)
        if stage == "bridge":
            rows = [row for row in rows if lacks_block_b(row) is None]
        return [row for row in rows if (row.subset, row.source) not in left_out]

    found: list[Row] = []
    for name, source in sources.items():
        if len(found) < OWN_ROWS:
            found += of_source(name, source)
    return found[:OWN_ROWS]


def _places(sources: Mapping[str, SourceSettings]) -> set[tuple[str | None, str | None]]:
    """Return where rows are from, whatever is taken from there."""
    return {_place(source) for source in sources.values()}


def _place(source: SourceSettings) -> tuple[str | None, str | None]:
    name = source.folder or source.file or source.mmeb or source.hub
    return (None if name is None else os.path.realpath(name), source.config)
