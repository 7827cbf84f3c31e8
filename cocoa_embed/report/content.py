"""What the page of a run shows, as plain values. Sections without content are left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cocoa_embed.report.tables import Table


class Curve(NamedTuple):
    """What a stage logged: ``series`` maps a metric to its (step, value) points; ``seconds`` is its duration.

    ``compared`` are the losses of another run's stage of that name, by the name of the run.
    """

    stage: str
    series: dict[str, list[tuple[int, float]]]
    seconds: float
    compared: dict[str, list[tuple[int, float]]]


class SearchHit(NamedTuple):
    """What a search found: an image (a data URI) with its caption; ``score`` is the cosine similarity."""

    image: str | None
    score: float
    caption: str
    correct: bool


class Search(NamedTuple):
    """A search (text, image as a data URI, or both) and its hits, best first.

    ``title`` is the kind of search ("text → image"); ``expected`` the caption of the right answer.
    """

    title: str
    text: str | None
    image: str | None
    hits: Sequence[SearchHit]
    expected: str | None


class Headline(NamedTuple):
    """A number to begin with: its label, the number, what it means, and what to compare it with."""

    label: str
    value: str
    meaning: str
    detail: str


class Evaluation(NamedTuple):
    """The tables of one evaluation; ``note`` says what was scored."""

    title: str
    note: str
    tables: Sequence[Table]


class StageSamples(NamedTuple):
    """What a stage made of some rows, as ``run.json`` has it; ``note`` says which rows."""

    stage: str
    note: str
    patches: Sequence[Mapping[str, str]]
    tokens: Sequence[Mapping[str, Any]]
    mask: Mapping[str, Sequence[str]] | None


class StageData(NamedTuple):
    """The rows of a stage: ``sources`` are (subset, where from, rows), ``bad`` (subset, source, reason)."""

    stage: str
    rows: int
    notes: Sequence[str]
    sources: Sequence[tuple[str, str, int]]
    fingerprint: str
    bad_count: int
    bad: Sequence[Sequence[str]]


class RecipeTables(NamedTuple):
    """A recipe: (key, value) of the whole run; the keys of the stages that were given and those that were not.

    ``text`` is the recipe as a file.
    """

    whole: Sequence[tuple[str, str]]
    given: Table
    defaults: Table
    text: str


@dataclass(frozen=True)
class RunPage:
    """Everything that the page of a run shows.

    :param facts: (label, value) pairs about the run.
    :param alerts: What to know before anything else, such as unfinished stages.
    :param command: What has written the page.
    """

    title: str
    subtitle: str
    command: str = "cocoa-embed report"
    alerts: Sequence[str] = ()
    headlines: Sequence[Headline] = ()
    evaluations: Sequence[Evaluation] = ()
    searches: Sequence[Search] = ()
    curves: Sequence[Curve] = ()
    samples: Sequence[StageSamples] = ()
    recipe: RecipeTables | None = None
    data: Sequence[StageData] = ()
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
