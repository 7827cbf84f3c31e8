"""The queries that went best and worst, with what was found for them, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cocoa_embed.data.rows import Item, load_item_image
from cocoa_embed.evaluation.metrics import ranks_of_relevant
from cocoa_embed.evaluation.pairs import Direction
from cocoa_embed.evaluation.pairs_tables import title_of
from cocoa_embed.report.content import Gallery, Hit, QueryResult
from cocoa_embed.report.page import cut

if TYPE_CHECKING:
    from PIL import Image


WORST, BEST = 6, 3
"""Queries of a direction that are shown."""

SHOWN_HITS = 5

THUMBNAIL = 256
"""Longest side in pixels of an image that is kept for a gallery."""


class Outcome(NamedTuple):
    """How one query went.

    :param rank: Of its best right answer.
    :param margin: That answer's cosine less that of the best wrong one; infinite where nothing is wrong.
    :param found: The first documents and the best right one, by number.
    :param scores: Their cosines.
    """

    rank: int
    margin: float
    found: list[int]
    scores: list[float]


@dataclass
class QueryGallery:
    """Watches an evaluation (``evaluate_pairs``), then shows the best and the worst.

    What is kept of a query is a few numbers; images are loaded for those that are shown alone.
    """

    _outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    _directions: dict[str, Direction] = field(default_factory=dict)

    def observe(self, direction: Direction, start: int, similarities: np.ndarray) -> None:
        """Take note of how queries went: float64 ``[some queries, documents]``, the first of them number ``start``."""
        self._directions[direction.name] = direction
        outcomes = self._outcomes.setdefault(direction.name, [])
        relevant = direction.relevant[start : start + len(similarities)]
        outcomes += [_outcome(row, own) for row, own in zip(similarities, relevant, strict=True)]

    def galleries(self, worst: int = WORST, best: int = BEST) -> list[Gallery]:
        """Return two galleries for each direction: the worst queries, worst first, and the best, best first.

        :raises ImageError: If an image that is to be shown cannot be used.
        """
        return [
            gallery
            for name, direction in self._directions.items()
            for gallery in _galleries(direction, self._outcomes[name], worst, best)
        ]


def _outcome(similarities: np.ndarray, relevant: np.ndarray) -> Outcome:
    rank = int(ranks_of_relevant(similarities, relevant)[0])
    right = int(relevant[np.argmax(similarities[relevant])])
    is_wrong = np.ones(len(similarities), dtype=bool)
    is_wrong[relevant] = False
    margin = float(similarities[right] - similarities[is_wrong].max()) if is_wrong.any() else float("inf")
    found = _first(similarities, is_wrong, SHOWN_HITS)
    if right not in found:
        found.append(right)
    return Outcome(rank, margin, found, [float(similarities[number]) for number in found])


def _first(similarities: np.ndarray, is_wrong: np.ndarray, count: int) -> list[int]:
    """Return the numbers of the best ``count`` documents, best first.

    What scores as a right answer does counts as before it, and is shown there; what is equal otherwise stays in its
    order. Only what scores as well as the last of them is sorted, as a query may search many documents.
    """
    candidates = np.arange(len(similarities))
    if count < len(similarities):
        last = np.partition(similarities, len(similarities) - count)[len(similarities) - count]
        candidates = np.flatnonzero(similarities >= last)
    order = np.lexsort((~is_wrong[candidates], -similarities[candidates]))
    return [int(number) for number in candidates[order[:count]]]


def _galleries(direction: Direction, outcomes: list[Outcome], worst: int, best: int) -> list[Gallery]:
    order = sorted(range(len(outcomes)), key=lambda number: (-outcomes[number].rank, outcomes[number].margin))
    worst, best = min(worst, (len(order) + 1) // 2), min(best, len(order) // 2)
    title = title_of(direction.name)
    failed = sum(outcome.rank > 1 for outcome in outcomes)
    shown = [order[:worst], order[::-1][:best]]
    notes = [
        f"{failed} of {len(outcomes)} queries do not have a right answer in first place; the farthest off come first."
        if failed
        else f"All {len(outcomes)} queries have a right answer in first place; these were the closest calls.",
        "The right answer is in first place, and farthest ahead of the best wrong one."
        if all(outcomes[number].rank == 1 for number in shown[1])
        else "Even among the best, not every right answer is in first place.",
    ]
    titles = [f"{title}: the worst queries", f"{title}: the best queries"]
    return [
        Gallery(heading, note, [_result(direction, number, outcomes[number], title) for number in numbers])
        for heading, note, numbers in zip(titles, notes, shown, strict=True)
        if numbers
    ]


def _result(direction: Direction, number: int, outcome: Outcome, title: str) -> QueryResult:
    query, relevant = direction.queries[number], set(direction.relevant[number].tolist())
    hits = []
    for place, (found, score) in enumerate(zip(outcome.found, outcome.scores, strict=True), 1):
        document = direction.documents[found]
        rank = outcome.rank if place > SHOWN_HITS else place
        hits.append(Hit(_thumbnail(document), score, cut(document.text or ""), found in relevant, rank))
    return QueryResult(
        title=title,
        text=None if query.text is None else cut(query.text),
        image=_thumbnail(query),
        hits=hits,
        rank=outcome.rank,
        margin=outcome.margin if np.isfinite(outcome.margin) else None,
    )


def _thumbnail(item: Item) -> Image.Image | None:
    if item.image is None:
        return None
    image = load_item_image(item.image)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
