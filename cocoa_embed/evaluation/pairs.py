"""Scores a model on pairs of one's own, in both directions, and compares two models on the same queries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.embed import BATCH_TOKENS, Item, embed_items, unsupported
from cocoa_embed.evaluation.metrics import METRICS, cosine_similarities, query_metrics, ranks_of_relevant
from cocoa_embed.evaluation.significance import LEVEL, RESAMPLES, mean_intervals, paired_differences

QUERIES_AT_ONCE = 512
"""Queries whose similarities with all documents are held in memory together."""


class Pair(NamedTuple):
    """Two items that belong together. In one direction the first is the query, in the other the second."""

    first: Item
    second: Item


@dataclass(frozen=True)
class Direction:
    """Queries, the documents that are searched, each once, and what belongs together.

    :param relevant: For each query the numbers of its documents, at least one, int ``[relevant]``.
    :param groups: The group of each query, int ``[queries]``: those that share a document, however indirectly.
    """

    name: str
    queries: Sequence[Item]
    documents: Sequence[Item]
    relevant: Sequence[np.ndarray]
    groups: np.ndarray


def directions(pairs: Sequence[Pair]) -> list[Direction]:
    """Return both directions: from the first items to the second, and back.

    Items that are equal are one, so that an image with several captions has several relevant texts, and a caption that
    several images have has several relevant images. They are named by what they are made of, as ``text_to_image``.

    :raises CocoaError: If there are no two pairs that differ.
    """
    kinds = [_kind([pair[side] for pair in pairs]) for side in (0, 1)]
    if len(set(kinds)) == 1:
        kinds = ["first", "second"]
    if any(len({pair[side] for pair in pairs}) < 2 for side in (0, 1)):
        raise CocoaError(f"there is nothing to tell apart in {len(pairs)} pairs; give pairs of different items")
    back = [Pair(second, first) for first, second in pairs]
    return [_direction(f"{kinds[0]}_to_{kinds[1]}", pairs), _direction(f"{kinds[1]}_to_{kinds[0]}", back)]


def _kind(items: Sequence[Item]) -> str:
    found = {item.parts for item in items}
    return "_and_".join(sorted(found.pop())) if len(found) == 1 else "mixed"


def _direction(name: str, pairs: Sequence[Pair]) -> Direction:
    queries = {query: number for number, query in enumerate(dict.fromkeys(query for query, _ in pairs))}
    documents = {document: number for number, document in enumerate(dict.fromkeys(second for _, second in pairs))}
    relevant: list[dict[int, None]] = [{} for _ in queries]
    for query, document in pairs:
        relevant[queries[query]][documents[document]] = None
    numbers = [np.array(list(each)) for each in relevant]
    return Direction(name, list(queries), list(documents), numbers, _groups(numbers, len(documents)))


def _groups(relevant: Sequence[np.ndarray], documents: int) -> np.ndarray:
    """Return a number for each query, the same for those that share a document or are linked by others that do."""
    leader = list(range(documents))

    def lead(document: int) -> int:
        while leader[document] != document:
            leader[document] = leader[leader[document]]
            document = leader[document]
        return document

    for each in relevant:
        for document in each[1:]:
            leader[lead(int(document))] = lead(int(each[0]))
    return np.array([lead(int(each[0])) for each in relevant])


Observe = Callable[[Direction, int, np.ndarray], None]
"""Is shown similarities as they are made: float64 ``[some queries, documents]``, and the number of the first query."""


def score_queries(
    encoder: Encoder,
    direction: Direction,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
    observe: Observe | None = None,
) -> np.ndarray:
    """Return the metrics of each query, float64 ``[queries, METRICS]``, in [0, 1].

    Queries get the model's query prompt, documents its document prompt.

    :param observe: Is shown all similarities, some queries at a time.
    :raises CocoaError: If an item cannot be embedded.
    """
    label = f"{encoder.name}, {direction.name}" if progress else None
    queries = embed_items(encoder, direction.queries, "query", batch_tokens, progress=label).vectors
    documents = embed_items(encoder, direction.documents, "document", batch_tokens, progress=label).vectors
    found = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        similarities = cosine_similarities(queries[start : start + QUERIES_AT_ONCE], documents)
        relevant = direction.relevant[start : start + QUERIES_AT_ONCE]
        if observe is not None:
            observe(direction, start, similarities)
        found += [ranks_of_relevant(row, own) for row, own in zip(similarities, relevant, strict=True)]
    metrics = query_metrics(found)
    return np.stack([metrics[name] for name in METRICS], axis=1)


def evaluate_pairs(
    encoders: Iterable[Encoder],
    pairs: Sequence[Pair],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
    observe: Observe | None = None,
    publish: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Score one model, or compare two on the same queries.

    :param encoders: One or two; an iterator may load the second when the first is done.
    :param observe: Is shown the similarities of each model in each direction.
    :param publish: Is shown what is returned, after each model as far as it goes.
    :return: ``subsets`` (metrics by direction, of the first model), ``averages`` (over both directions), ``intervals``
        (the two ends by direction and metric), ``counts`` (queries, documents and groups by direction). With a second
        model also ``other``, its part of the same, and ``comparison``: by direction and metric ``difference`` (the
        first less the second), ``low``, ``high`` and ``p``.
    :raises CocoaError: If a model cannot embed the items, or there are too few pairs.
    """
    both = directions(pairs)
    parts = {item.parts for item in (*both[0].queries, *both[0].documents)}
    counts = {
        each.name: {
            "queries": len(each.queries),
            "documents": len(each.documents),
            "groups": len(np.unique(each.groups)),
        }
        for each in both
    }
    settings = {"benchmark": "pairs", "pairs": len(pairs), "seed": seed, "resamples": resamples, "level": LEVEL}
    chance = {each.name: {"hit@1": np.mean([len(own) for own in each.relevant]) / len(each.documents)} for each in both}
    document: dict[str, Any] = {**settings, "counts": counts, "chance": chance}
    scores: list[list[np.ndarray]] = []
    for encoder in encoders:
        if reason := unsupported(encoder, parts):
            raise CocoaError(f"{reason}; these pairs need a model that does")
        scores.append([score_queries(encoder, each, batch_tokens, progress, observe) for each in both])
        found = _model_scores(encoder.name, both, scores[-1], seed, resamples)
        del encoder  # so that it is gone when the next is loaded
        if len(scores) == 1:
            document |= found
        else:
            document["other"] = found
            document["comparison"] = {
                each.name: _compared(ours, theirs, each, seed, resamples)
                for each, ours, theirs in zip(both, *scores, strict=True)
            }
        if publish is not None:
            publish(document)
    return document


def _compared(
    ours: np.ndarray, theirs: np.ndarray, direction: Direction, seed: int, resamples: int
) -> dict[str, dict[str, float]]:
    found = paired_differences(ours, theirs, direction.groups, np.random.default_rng(seed), resamples)
    return {metric: each._asdict() for metric, each in zip(METRICS, found, strict=True)}


def _model_scores(
    name: str, both: Sequence[Direction], scores: Sequence[np.ndarray], seed: int, resamples: int
) -> dict[str, Any]:
    means = {
        each.name: {metric: float(mean) for metric, mean in zip(METRICS, values.mean(axis=0), strict=True)}
        for each, values in zip(both, scores, strict=True)
    }
    intervals = {}
    for each, values in zip(both, scores, strict=True):
        ends = mean_intervals(values, each.groups, np.random.default_rng(seed), resamples)
        intervals[each.name] = {metric: list(interval) for metric, interval in zip(METRICS, ends, strict=True)}
    averages = {metric: float(np.mean([means[each.name][metric] for each in both])) for metric in METRICS}
    return {"model": name, "subsets": means, "averages": averages, "intervals": intervals}
