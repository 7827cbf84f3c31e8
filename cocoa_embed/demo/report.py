"""The demo's report: what happened, as one HTML file that needs no network.

A pure renderer. :class:`DemoReport` holds everything the page shows; :func:`render_report` turns it into a string.
Sections without content are left out.
"""

import math
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cocoa_embed.demo import figures
from cocoa_embed.errors import require

if TYPE_CHECKING:
    from PIL import Image

OURS = "all three stages"
"""The :attr:`RetrievalRow.name` that the page puts forward."""

BLOCKS = ("A", "EOS", "B", "pad")
_TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class Curve:
    """What a stage logged: ``series`` maps a name to its (step, value) points; ``seconds`` is the stage's duration.

    ``stage`` is "warm-up", "bridge", "contrastive" or "contrastive only". Names with "loss" share a panel, and so do
    names with "accuracy", whose values are shares from 0 to 1. Of the bridge, ``accuracy_right_image`` and
    ``accuracy_shuffled_image`` together make the panel of the plateau.
    """

    stage: str
    series: dict[str, list[tuple[int, float]]]
    seconds: float


@dataclass(frozen=True)
class PatchReconstruction:
    """An image, the image with half of its patches hidden, and what the warm-up's decoder made of it; RGB, any size."""

    original: "Image.Image"
    masked: "Image.Image"
    reconstructed: "Image.Image"
    caption: str


@dataclass(frozen=True)
class TokenReconstruction:
    """A caption whose ``hidden`` tokens the model predicted; the three lists have one entry a token.

    ``predicted`` holds the prediction where a token was hidden, and the token itself where it was not.
    """

    tokens: list[str]
    hidden: list[bool]
    predicted: list[str]
    stage: str
    image: "Image.Image | None" = None

    def __post_init__(self) -> None:
        """Check the lengths.

        :raises ValueError: If the lists differ in length.
        """
        if not len(self.tokens) == len(self.hidden) == len(self.predicted):
            raise ValueError(
                f"A token reconstruction needs one entry a token in each list: {len(self.tokens)} tokens, "
                f"{len(self.hidden)} hidden, {len(self.predicted)} predicted."
            )

    @property
    def right(self) -> int:
        """How many hidden tokens were predicted right."""
        return sum(
            hidden and token == predicted
            for token, hidden, predicted in zip(self.tokens, self.hidden, self.predicted, strict=True)
        )


@dataclass(frozen=True, eq=False)
class BridgeMask:
    """The bridge's attention mask for one sequence of L positions.

    ``allowed`` is bool ``[L, L]``, rows attend to columns; ``labels`` the token text of each position; ``blocks`` one
    of "A", "EOS", "B", "pad" for each position.
    """

    allowed: np.ndarray
    labels: list[str]
    blocks: list[str]

    def __post_init__(self) -> None:
        """Check the sizes and the names.

        :raises ValueError: If the sizes differ or a block has another name.
        """
        length = len(self.labels)
        if self.allowed.shape != (length, length) or len(self.blocks) != length:
            raise ValueError(
                f"A bridge mask over {length} labels needs a {length} x {length} array and {length} blocks; "
                f"found an array of shape {self.allowed.shape} and {len(self.blocks)} blocks."
            )
        if unknown := sorted(set(self.blocks) - set(BLOCKS)):
            raise ValueError(f"Unknown blocks {unknown} in a bridge mask; a block is one of {', '.join(BLOCKS)}.")


@dataclass(frozen=True)
class Hit:
    """One image found: ``score`` is the cosine similarity, ``correct`` whether it is a right answer."""

    image: "Image.Image"
    score: float
    caption: str
    correct: bool


@dataclass(frozen=True)
class QueryResult:
    """A search (text, image or both) and its hits, best first.

    ``title`` says what is searched by what ("text → image"); queries of one title stand together. ``expected`` is the
    caption or the id of the right answer.
    """

    title: str
    text: str | None
    image: "Image.Image | None"
    hits: list[Hit]
    expected: str | None = None


@dataclass(frozen=True)
class RetrievalRow:
    """Scores from 0 to 1 of ``name`` ("all three stages", "contrastive only", "chance") in one ``direction``."""

    name: str
    direction: str
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    mrr: float


@dataclass(frozen=True)
class DemoReport:
    """Everything the page shows; ``facts`` are (label, value) pairs about the run."""

    title: str
    subtitle: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    table: list[RetrievalRow] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    patches: list[PatchReconstruction] = field(default_factory=list)
    tokens: list[TokenReconstruction] = field(default_factory=list)
    bridge_mask: BridgeMask | None = None
    queries: list[QueryResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_report(report: DemoReport, path: str | Path) -> None:
    """Write the page to ``path``."""
    Path(path).write_text(render_report(report), encoding="utf-8")


def render_report(report: DemoReport) -> str:
    """Return the page: one HTML document with its styles, images and charts inside.

    :raises MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"data_uri": figures.data_uri, "token": token_text}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page: str = template.render(**_content(report))
    return page


def token_text(token: str) -> str:
    """Return ``token`` as people read it: without its leading space, white space alone made visible."""
    text = token.replace("Ġ", " ").replace("Ċ", "\n")
    return text.strip() or {"": "∅"}.get(text, "⏎" if "\n" in text else "␣")


def _content(report: DemoReport) -> dict[str, Any]:
    """Return the template's variables."""
    mask = report.bridge_mask
    panels, plateau = figures.stage_panels(report.curves), figures.plateau_panel(report.curves)
    content = {
        "results": _results(report.table),
        "searches": _grouped(report.queries, "title"),
        "curves": panels,
        "patches": report.patches,
        "words": _grouped(report.tokens, "stage"),
        "bridge": mask and {"mask": mask, "runs": figures.mask_runs(mask), "spans": figures.block_spans(mask.blocks),
                            "table": figures.block_table(mask)},
        "plateau": plateau,
        "notes": report.notes,
        "run": report.facts,
    }  # fmt: skip
    return content | {"report": report, "headlines": _headlines(report.table), "ours": OURS}


def _grouped(items: list[Any], attribute: str) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, attribute), []).append(item)
    return groups


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def _results(table: list[RetrievalRow]) -> list[dict[str, Any]]:
    """Return the table by direction: rows of cells (text, value, whether it is the best of its column)."""
    groups = []
    ordered = sorted(table, key=lambda row: [other.direction for other in table].index(row.direction))
    for direction, members in groupby(ordered, key=lambda row: row.direction):
        rows = list(members)
        columns = []
        for measure in ("recall_at_1", "recall_at_5", "recall_at_10", "mrr"):
            values = [getattr(row, measure) for row in rows]
            texts = [
                f"{value:.3f}" if measure == "mrr" and math.isfinite(value) else _percent(value) for value in values
            ]
            best = max((value for value in values if math.isfinite(value)), default=None)
            best_text = texts[values.index(best)] if best is not None else None
            columns.append([(text, value, text == best_text) for text, value in zip(texts, values, strict=True)])
        lines = [(row.name, cells) for row, cells in zip(rows, zip(*columns, strict=True), strict=True)]
        groups.append({"direction": direction, "rows": lines})
    return groups


def _headlines(table: list[RetrievalRow]) -> list[dict[str, Any]]:
    """Return our recall@1 of each direction, with that of the others beside it."""
    return [
        {
            "direction": ours.direction,
            "value": _percent(ours.recall_at_1),
            "others": [
                (row.name, _percent(row.recall_at_1))
                for row in table
                if row.direction == ours.direction and row.name != OURS
            ],
        }
        for ours in table
        if ours.name == OURS
    ]
