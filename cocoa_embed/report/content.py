"""What a report holds: plain values and images, whoever makes them. Sections without content are left out."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cocoa_embed.report.tables import Table

if TYPE_CHECKING:
    from PIL import Image

OURS = "all three stages"
"""The ``RetrievalRow.name`` that the page puts forward."""

BLOCKS = ("A", "EOS", "B", "pad")


@dataclass(frozen=True)
class Curve:
    """What a stage logged: ``series`` maps a name to its (step, value) points; ``seconds`` is the stage's duration.

    ``stage`` is "warm-up", "bridge", "contrastive" or "contrastive only". Names with "loss" share a panel, and so do
    names with "accuracy", whose values are shares from 0 to 1. Of the bridge, ``accuracy_matching_image`` and
    ``accuracy_shuffled_image``, with ``accuracy_no_image`` where it is there, make the panel of the plateau.
    ``alignment``, ``uniformity``, ``modality_gap`` and ``effective_rank`` have a section of their own.
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

    ``predicted`` holds the prediction where a token was hidden, and the token itself where it was not. ``stage`` is
    "warm-up" or "bridge".
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
    """What was found: an image, or without one the text ``caption``.

    ``score`` is the cosine similarity, ``correct`` whether it is a right answer, ``rank`` its place among all that was
    searched where that is not its place in the list.
    """

    image: "Image.Image | None"
    score: float
    caption: str
    correct: bool
    rank: int | None = None


@dataclass(frozen=True)
class QueryResult:
    """A search (text, image or both) and its hits, best first.

    ``title`` says what is searched by what ("text → image"); queries of one title stand together. ``expected`` is the
    caption or the id of the right answer. ``rank`` is that of the best right answer, ``margin`` its score less that of
    the best wrong one.
    """

    title: str
    text: str | None
    image: "Image.Image | None"
    hits: list[Hit]
    expected: str | None = None
    rank: int | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Gallery:
    """Queries chosen for how they went; ``note`` is a sentence that says which."""

    title: str
    note: str
    queries: list[QueryResult]


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
class Headline:
    """A number to begin with: what it is of, the number, what it means, and what to hold beside it."""

    label: str
    value: str
    meaning: str
    detail: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Tables of one evaluation, under a ``title``; ``note`` says what was scored on what."""

    title: str
    note: str
    tables: list[Table]


@dataclass(frozen=True)
class RecipeTable:
    """A recipe: (key, value) pairs of the whole run, and a row (key, a value for each of ``stages``) of the stages'.

    ``defaults`` are the rows whose values nobody has chosen; ``yaml`` is the recipe as a file.
    """

    whole: list[tuple[str, str]]
    stages: list[str]
    rows: list[tuple[str, list[str]]]
    defaults: list[tuple[str, list[str]]] = field(default_factory=list)
    yaml: str = ""


@dataclass(frozen=True)
class StageData:
    """What a stage was trained on: ``sources`` are (subset, where from, rows), ``fingerprint`` tells the rows.

    ``kept_out`` counts the images whose rows it was not trained on; ``notes`` are sentences about the rows.
    """

    stage: str
    sources: list[tuple[str, str, int]]
    fingerprint: str
    kept_out: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many rows there were in all."""
        return sum(count for _, _, count in self.sources)


@dataclass(frozen=True)
class DataUsed:
    """The data of a run, and the rows that were left out: how many, and some of them as (subset, source, reason)."""

    stages: list[StageData]
    bad: int = 0
    shown_bad: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class RunReport:
    """Everything the page shows.

    :param facts: (label, value) pairs about the run.
    :param alerts: What is to be known before anything else, such as stages that are missing.
    :param sample_notes: Which rows the reconstructions of a stage are of.
    :param command: What has written the page.
    :param pictures: There are images among the data; else nothing is said of any.
    :param bidirectional: The model was made to look both ways.
    """

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
    alerts: list[str] = field(default_factory=list)
    headlines: list[Headline] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    recipe: RecipeTable | None = None
    data: DataUsed | None = None
    sample_notes: dict[str, str] = field(default_factory=dict)
    command: str = "cocoa-embed"
    pictures: bool = True
    bidirectional: bool = True
