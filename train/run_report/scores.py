"""Score the model of a run for its report, on pairs of one's own or on rows of the run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.evaluation.embed import BATCH_TOKENS, Item
from cocoa_embed.evaluation.galleries import QueryGallery
from cocoa_embed.evaluation.pairs import Pair, evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.evaluation.pairs_tables import title_of
from cocoa_embed.report.content import Gallery, Headline
from cocoa_embed.report.series import STAGE_TITLES
from cocoa_embed.train.data import rows as data
from cocoa_embed.train.data.arrow_images import StoredImage
from cocoa_embed.train.loop.oom import is_out_of_memory
from cocoa_embed.train.run_report.finished_run import FinishedRun
from cocoa_embed.train.run_report.rows import OwnRows, before_the_bridge, draws, earlier_stages, overlap, read_own_rows

FIRST = "hit@1"
UNTOLD = "Whether the model has seen them in training is not known for certain."


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs, and what to say of them.

    :param title: What they are.
    :param note: Sentences about them.
    :param held_out: The model was trained on none of them; None where that cannot be told.
    """

    pairs: list[Pair]
    title: str
    note: str
    held_out: bool | None


@dataclass(frozen=True)
class RunScores:
    """How the model of a run did on pairs.

    :param document: As ``evaluate_pairs`` returns it.
    """

    scored: ScoredPairs
    stage: str
    document: dict[str, Any]
    galleries: list[Gallery]


def score_run(
    run: FinishedRun,
    scored: ScoredPairs,
    device: str,
    *,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> RunScores:
    """Score the run's last checkpoint in both directions.

    :param device: The torch device.
    :param batch_tokens: About the most tokens to embed at once.
    :raises CocoaError: If the checkpoint cannot be loaded, an item cannot be embedded, or memory does not suffice.
    """
    last = run.results[-1]
    name = f"{run.folder.resolve().name}/{last.stage}"
    gallery = QueryGallery()
    with _explained_shortage(name, device):
        encoder = load_encoder(last.folder, device)
        encoder.name = name
        document = evaluate_pairs(
            [encoder],
            scored.pairs,
            batch_tokens=batch_tokens or BATCH_TOKENS,
            progress=progress,
            observe=gallery.observe,
        )
    return RunScores(scored, last.stage, document, gallery.galleries())


@contextmanager
def _explained_shortage(name: str, device: str) -> Iterator[None]:
    try:
        yield
    except (CocoaError, RuntimeError) as error:
        cause = error if isinstance(error, RuntimeError) else error.__cause__
        if not (isinstance(cause, RuntimeError) and is_out_of_memory(cause)):
            raise
        raise CocoaError(
            f"{name} does not fit into the memory of {device} ({one_line(cause).split('. ')[0]}); give a smaller"
            " --batch-tokens, another --device, or --no-scores"
        ) from error


def given_pairs(run: FinishedRun, path: Path, images: Path | None) -> ScoredPairs:
    """Read pairs as ``cocoa-embed eval pairs`` does, and see which of them the run was trained on.

    :raises CocoaError: If they cannot be read.
    """
    pairs = read_pairs(path, images)
    note, held_out = seen_in_training(run, pairs)
    return ScoredPairs(pairs, f"{len(pairs):,} pairs of {printable(path)}", note, held_out)


def seen_in_training(run: FinishedRun, pairs: Sequence[Pair]) -> tuple[str, bool | None]:
    """Return what to say of pairs that a run's model is scored on, and whether it was trained on none of them.

    The second is None where that cannot be told.
    """
    found = overlap(run, pairs)
    notes = []
    if found.pairs:
        drew = all(draws(run, result.stage)[1] for result in run.results)
        verb = "was trained on" if drew else "draws its training from"
        notes.append(
            f"{found.pairs:,} of {len(pairs):,} are among the rows that the run {verb}, so the scores say less of how"
            " the model does on others."
        )
    elif not found.unknown:
        notes.append("None of them is among the rows that the run draws from.")
    if found.unknown:
        notes.append(f"Whether they are among the rows of {', '.join(found.unknown)} cannot be told.")
    return " ".join(notes), False if found.pairs else None if found.unknown else True


def own_pairs(run: FinishedRun, tell: Callable[[str], None] | None = None) -> ScoredPairs:
    """Return the first rows of the run's last stage as pairs; of a bridge those that it kept out, if it did.

    :param tell: Is told that rows are read, which takes a while where there are many.
    :raises CocoaError: If they cannot be read any more, or not without the network.
    """
    own = read_own_rows(run, tell)
    title = _own_title(run, own)
    notes = ["No other pairs were given."]
    if own.kept_out:
        before = before_the_bridge(run)
        notes.append(f"The {STAGE_TITLES[own.stage]} stage was not trained on these rows. {before}".rstrip())
        held_out = None if before else True
    else:
        held_out = False
        told = "has been trained on" if draws(run, own.stage)[1] else "draws its training from"
        notes.append(
            f"These are rows that the model {told}: they show whether it has learned them, and say nothing of how it"
            " does on others. For that, write the report with --pairs."
        )
    if own.is_same is None:
        notes.append("Whether the data are as they were when the run began was not checked.")
    elif not own.is_same:
        held_out = False
        notes.append("The data are no longer as they were when the run began: some of these rows may be others.")
    return ScoredPairs([_pair(row) for row in own.rows], title, " ".join(notes), held_out)


def _own_title(run: FinishedRun, own: OwnRows) -> str:
    stage, count = STAGE_TITLES[own.stage], len(own.rows)
    if own.is_same is False:
        return f"The first {count} rows of what the {stage} stage's data are now"
    if own.kept_out:
        return f"The {count} rows that the {stage} stage kept out of its training"
    how = "was trained on" if draws(run, own.stage)[1] else "draws from"
    return f"The first {count} rows that the {stage} stage {how}"


def _pair(row: data.Row) -> Pair:
    return Pair(_item(row.query), _item(row.positive))


def _item(item: data.Item) -> Item:
    image: str | bytes | None = None
    if isinstance(item.image, StoredImage):
        image = item.image.read()
    elif item.image is not None:
        image = str(item.image.absolute())
    return Item(item.text or None, image)


def stage_note(run: FinishedRun, stage: str) -> str:
    """Return what to know of a model that is not a contrastive stage's."""
    if stage == "contrastive":
        return ""
    why = "is not finished" if "contrastive" in run.missing else "is not part of this run"
    title = STAGE_TITLES[stage]
    if "contrastive" in earlier_stages(run):
        return f"A contrastive stage came before this run: this is the {title} stage's model, trained on from there."
    return (
        f"The contrastive stage {why}: this is the {title} stage's model, which has not been trained to retrieve here."
    )


def score_headlines(scores: RunScores) -> list[Headline]:
    """Return the first numbers of the page; none of rows that the model was trained on."""
    if scores.scored.held_out is False:
        return []
    untold = "" if scores.scored.held_out else f" {UNTOLD}"
    by_stage = "" if scores.stage == "contrastive" else f" After the {STAGE_TITLES[scores.stage]} stage alone."
    return direction_headlines(scores.document, f"{scores.scored.title}.{untold}{by_stage}")


def direction_headlines(document: dict[str, Any], remark: str) -> list[Headline]:
    """Return for each direction of a document of pairs how often a right answer comes first.

    A query may have several right answers, which cap its recall@1; whether one of them is first has no such cap.
    """
    found = []
    for way, counts in document["counts"].items():
        low, high = document["intervals"][way][FIRST]
        found.append(
            Headline(
                title_of(way),
                f"{100 * document['subsets'][way][FIRST]:.1f} %",
                "of queries have a right answer in first place",
                f"{FIRST} among {counts['documents']:,}; {100 * low:.1f} to {100 * high:.1f} %. {remark}",
            )
        )
    return found
