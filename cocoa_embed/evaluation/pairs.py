"""Score a model on pairs in both directions, and compare two models on the same queries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import block_array, csr_array
from scipy.sparse.csgraph import connected_components

from cocoa_embed.data.rows import Item
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation import BATCH_TOKENS
from cocoa_embed.evaluation.embed import embed_items, unsupported
from cocoa_embed.evaluation.metrics import (
    METRICS,
    chance_metrics,
    cosine_similarities,
    query_metrics,
    ranks_of_relevant,
)
from cocoa_embed.evaluation.pairs_reader import Pair
from cocoa_embed.evaluation.significance import LEVEL, RESAMPLES, mean_intervals, sign_flip_p

if TYPE_CHECKING:
    from cocoa_embed.encode.encoder import Encoder

QUERIES_AT_ONCE = 512
"""The number of queries whose similarities to all documents are in memory at once."""


@dataclass(frozen=True)
class Direction:
    """Distinct queries and documents, and which belong together.

    :param relevant: For each query the numbers of its documents, at least one, int ``[relevant]``.
    :param groups: The group of each query, int ``[queries]``: queries that common documents connect.
    """

    name: str
    queries: Sequence[Item]
    documents: Sequence[Item]
    relevant: Sequence[np.ndarray]
    groups: np.ndarray

    def counts(self) -> dict[str, int]:
        """Return the numbers of queries, documents and groups."""
        return {"queries": len(self.queries), "documents": len(self.documents), "groups": len(np.unique(self.groups))}

    def chance(self) -> dict[str, float]:
        """Return the expected ``METRICS`` of a random order of the documents."""
        counts, queries = np.unique([len(each) for each in self.relevant], return_counts=True)
        expected = [chance_metrics(int(count), len(self.documents)) for count in counts]
        return {name: float(np.average([each[name] for each in expected], weights=queries)) for name in METRICS}


def directions(pairs: Sequence[Pair]) -> list[Direction]:
    """Return both directions: from the first items to the second, and back.

    Equal items count as one: an image with several captions has several relevant texts, and a caption of several
    images has several relevant images. A direction is named by the parts of its items, such as ``text_to_image``.

    :raises CocoaError: If all first items or all second items are equal.
    """
    kinds = [_kind([pair[side] for pair in pairs]) for side in (0, 1)]
    if len(set(kinds)) == 1:
        kinds = ["first", "second"]
    if any(len({pair[side] for pair in pairs}) < 2 for side in (0, 1)):
        raise CocoaError(f"{len(pairs)} pairs have only one distinct query or document; give pairs of different items")
    back = [Pair(second, first) for first, second in pairs]
    return [_direction(f"{kinds[0]}_to_{kinds[1]}", pairs), _direction(f"{kinds[1]}_to_{kinds[0]}", back)]


def _kind(items: Sequence[Item]) -> str:
    found = {item.parts for item in items}
    return "_and_".join(sorted(found.pop())) if len(found) == 1 else "mixed"


def _direction(name: str, pairs: Sequence[Pair]) -> Direction:
    queries = {query: number for number, query in enumerate(dict.fromkeys(query for query, _ in pairs))}
    documents = {document: number for number, document in enumerate(dict.fromkeys(second for _, second in pairs))}
    edges = ([queries[query] for query, _ in pairs], [documents[document] for _, document in pairs])
    matrix = csr_array((np.ones(len(pairs)), edges), shape=(len(queries), len(documents)))
    relevant = np.split(matrix.indices, matrix.indptr[1:-1])
    _, groups = connected_components(block_array([[None, matrix], [matrix.T, None]]), directed=False)
    return Direction(name, list(queries), list(documents), relevant, groups[: len(queries)])


def score_queries(
    encoder: Encoder, direction: Direction, batch_tokens: int = BATCH_TOKENS, progress: bool = False
) -> np.ndarray:
    """Return the metrics of each query, float64 ``[queries, METRICS]``, in [0, 1].

    Queries get the model's query prompt, documents its document prompt.

    :raises CocoaError: If an item cannot be embedded.
    """
    label = f"{encoder.name}, {direction.name}" if progress else None
    queries = embed_items(encoder, direction.queries, "query", batch_tokens, label)
    documents = embed_items(encoder, direction.documents, "document", batch_tokens, label)
    ranks = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        some = slice(start, start + QUERIES_AT_ONCE)
        similarities = cosine_similarities(queries[some], documents)
        ranks += [ranks_of_relevant(row, own) for row, own in zip(similarities, direction.relevant[some], strict=True)]
    metrics = query_metrics(ranks)
    return np.stack([metrics[name] for name in METRICS], axis=1)


def evaluate_pairs(
    encoders: Iterable[Encoder],
    pairs: Sequence[Pair],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
    publish: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Score one model, or compare two on the same queries.

    :param encoders: One or two models; a generator can load the second after the first is freed.
    :param publish: Called with the document after each model.
    :returns: ``subsets`` (metrics by direction, of the first model), ``averages`` (over both directions),
        ``intervals`` (the two ends by direction and metric), ``chance`` (metrics by direction) and ``counts`` (queries,
        documents and groups by direction). With a second model, also ``other``, the same for that model, and
        ``comparison``: ``difference`` (first minus second), ``low``, ``high`` and ``p`` by direction and metric.
    :raises CocoaError: If a model cannot embed the items, or all queries or all documents are equal.
    """
    both = directions(pairs)
    document: dict[str, Any] = {
        "benchmark": "pairs",
        "pairs": len(pairs),
        "seed": seed,
        "resamples": resamples,
        "level": LEVEL,
        "counts": {each.name: each.counts() for each in both},
        "chance": {each.name: each.chance() for each in both},
    }
    parts = {item.parts for item in (*both[0].queries, *both[0].documents)}
    first: list[np.ndarray] | None = None
    for encoder in encoders:
        if reason := unsupported(encoder, parts):
            raise CocoaError(f"{reason}; these pairs need a model that does")
        scores = [score_queries(encoder, each, batch_tokens, progress) for each in both]
        summary = _summary(encoder.name, both, scores, seed, resamples)
        del encoder  # frees it before the next one is loaded
        if first is None:
            first = scores
            document |= summary
        else:
            document["other"] = summary
            document["comparison"] = {
                each.name: _comparison(ours - theirs, each.groups, seed, resamples)
                for each, ours, theirs in zip(both, first, scores, strict=True)
            }
        publish(document)
    return document


def _summary(
    name: str, both: Sequence[Direction], scores: Sequence[np.ndarray], seed: int, resamples: int
) -> dict[str, Any]:
    means, intervals = {}, {}
    for each, values in zip(both, scores, strict=True):
        ends = mean_intervals(values, each.groups, np.random.default_rng(seed), resamples)
        means[each.name] = {metric: float(column.mean()) for metric, column in zip(METRICS, values.T, strict=True)}
        intervals[each.name] = dict(zip(METRICS, ends.tolist(), strict=True))
    averages = {metric: float(np.mean([each[metric] for each in means.values()])) for metric in METRICS}
    return {"model": name, "subsets": means, "averages": averages, "intervals": intervals}


def _comparison(differences: np.ndarray, groups: np.ndarray, seed: int, resamples: int) -> dict[str, dict[str, float]]:
    low, high = mean_intervals(differences, groups, np.random.default_rng(seed), resamples).T
    p = sign_flip_p(differences, groups, np.random.default_rng(seed), resamples)
    columns = {"difference": differences.mean(axis=0), "low": low, "high": high, "p": p}
    return {metric: {name: float(column[at]) for name, column in columns.items()} for at, metric in enumerate(METRICS)}
