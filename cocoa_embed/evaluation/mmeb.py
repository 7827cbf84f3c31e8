"""Score a model on MMEB-V1.

Precision@1 is the ratio of rows whose first candidate, the correct one, has the highest cosine of the row's candidates,
as in VLM2Vec's ``eval.py``, with one difference: if another candidate has the same cosine, the row counts as wrong here
and as correct there. ``tied_rows`` counts these rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cocoa_embed.data.mmeb import AVERAGES, SUBSETS
from cocoa_embed.data.rows import Item
from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.evaluation import BATCH_TOKENS
from cocoa_embed.evaluation.embed import Role, embed_items, unsupported
from cocoa_embed.evaluation.metrics import cosine_similarities, query_metrics, ranks_of_relevant
from cocoa_embed.evaluation.mmeb_reader import CandidateRow, MmebFolder, SubsetData
from cocoa_embed.evaluation.result_cache import ResultCache

if TYPE_CHECKING:
    from cocoa_embed.encode.encoder import Encoder

SCORING = 2
"""Increase it when scores are computed differently, so that cached results are not used."""

METRICS = ("hit@1", "hit@5", "hit@10", "mrr", "ndcg@5", "ndcg@10")
"""The metrics reported in addition to precision@1, which equals hit@1."""


def evaluate_mmeb(
    encoder: Encoder,
    folder: MmebFolder,
    subsets: Sequence[SubsetData],
    cache: ResultCache,
    *,
    batch_tokens: int = BATCH_TOKENS,
    publish: Callable[[str, dict[str, Any]], None] = lambda line, document: None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a model on subsets. The result of a finished subset is cached, so that it is not scored again.

    :param subsets: From ``MmebFolder.read_subsets``.
    :param publish: Called after each subset with a sentence about it and the summary of the subsets so far.
    :returns: The ``summary``.
    :raises CocoaError: If an image cannot be used, the model fails or supports no subset, or a result cannot be
        written.
    """
    results: dict[str, Mapping[str, Any]] = {}
    not_run = dict.fromkeys(SUBSETS, "not in the data") | dict.fromkeys(folder.subsets(), "not selected")
    not_run |= {subset.name: "not finished" for subset in subsets}
    for subset in subsets:
        if reason := unsupported(encoder, subset.parts):
            not_run[subset.name] = reason
            publish(f"{subset.name}: not run: {reason}", summary(encoder, results, not_run))
            continue
        key = {"model": encoder.fingerprint, "dimension": encoder.dimension, "data": subset.digest, "scoring": SCORING}
        result = cache.read(subset.name, key)
        source = "cached"
        if result is None:
            result = score_subset(encoder, folder, subset, batch_tokens, progress)
            cache.write(subset.name, key, result)
            source = f"{result['queries']} queries and {result['targets']} targets embedded, {result['seconds']:.1f} s"
        results[subset.name] = result
        del not_run[subset.name]
        line = f"{subset.name}: precision@1 {result['precision@1']:.3f} of {result['rows']} rows ({source})"
        publish(line, summary(encoder, results, not_run))
    if not results:
        raise CocoaError(f"nothing was run: {not_run[subsets[0].name]}; use a model of images and text")
    return summary(encoder, results, not_run)


def score_subset(
    encoder: Encoder, folder: MmebFolder, data: SubsetData, batch_tokens: int = BATCH_TOKENS, progress: bool = False
) -> dict[str, Any]:
    """Embed each distinct query and target of a subset once, and score its rows.

    :returns: precision@1 and ``METRICS``, each in [0, 1]; ``chance``, the expected precision@1 of random order; counts;
        ``partial``; ``seconds``; and ``by_row``, the source and the rank of the correct candidate of each row.
    :raises CocoaError: If an image cannot be used, or the model fails.
    """
    started = time.perf_counter()

    def embed(items: Sequence[Item], role: Role) -> np.ndarray:
        label = f"{data.name}, {role}" if progress else None
        return embed_items(encoder, [item.under(folder.images) for item in items], role, batch_tokens, label)

    try:
        queries, targets = embed(data.queries, "query"), embed(data.targets, "document")
    except ImageError as error:
        raise CocoaError(f"{data.name}: {error}; download the image again") from error
    ranks, is_tied = zip(*(_score_row(row, queries, targets) for row in data.rows), strict=True)
    metrics = query_metrics([np.array([rank]) for rank in ranks])
    return {
        "precision@1": float(metrics["hit@1"].mean()),
        **{name: float(metrics[name].mean()) for name in METRICS},
        "chance": float(np.mean([1 / len(row.targets) for row in data.rows])),
        "rows": len(data.rows),
        "rows_in_data": data.rows_in_data,
        "rows_merged": data.rows_merged,
        "tied_rows": sum(is_tied),
        "partial": len(data.rows) < data.rows_in_data,
        "queries": len(data.queries),
        "targets": len(data.targets),
        "seconds": round(time.perf_counter() - started, 2),
        "by_row": {"place": [row.source for row in data.rows], "rank": list(ranks)},
    }


def _score_row(row: CandidateRow, queries: np.ndarray, targets: np.ndarray) -> tuple[int, bool]:
    """Return the rank of a row's correct candidate, and whether the best wrong one has the same cosine.

    :param queries: Embeddings by a row's ``query``, float ``[queries, dimension]``.
    :param targets: Embeddings by a row's ``targets``, float ``[targets, dimension]``.
    """
    similarities = cosine_similarities(queries[row.query][None], targets[row.targets])[0]
    rank = int(ranks_of_relevant(similarities, np.array([0]))[0])
    return rank, len(similarities) > 1 and bool(similarities[0] == similarities[1:].max())


def summary(encoder: Encoder, results: Mapping[str, Mapping[str, Any]], not_run: Mapping[str, str]) -> dict[str, Any]:
    """Return the document that ``--json`` prints.

    :param results: From ``score_subset``, by subset.
    :param not_run: Why the other subsets were not run.
    :returns: ``subsets``: metrics and counts by name. ``averages``: for each of ``AVERAGES``, the mean precision@1 over
        the subsets that were run, None if none was; ``chance``: the same for a random order. ``coverage``: for each
        average, ``run``, ``of``, and ``complete``, which is true if all of its subsets were run on all their rows.
        ``not_run``: reasons by name.
    """
    averages: dict[str, float | None] = {}
    chance: dict[str, float | None] = {}
    coverage: dict[str, dict[str, Any]] = {}
    for average in AVERAGES:
        members = [name for name, subset in SUBSETS.items() if average in subset.averages]
        run = [results[name] for name in members if name in results]
        averages[average] = float(np.mean([each["precision@1"] for each in run])) if run else None
        chance[average] = float(np.mean([each["chance"] for each in run])) if run else None
        is_complete = len(run) == len(members) and not any(each["partial"] for each in run)
        coverage[average] = {"run": len(run), "of": len(members), "complete": is_complete}
    return {
        "benchmark": "MMEB-V1",
        "model": encoder.name,
        "fingerprint": encoder.fingerprint,
        "subsets": {
            name: {key: value for key, value in result.items() if key not in ("by_row", "key")}
            | {"meta_task": SUBSETS[name].meta_task, "in_domain": SUBSETS[name].in_domain}
            for name, result in results.items()
        },
        "averages": averages,
        "chance": chance,
        "coverage": coverage,
        "not_run": {name: not_run[name] for name in SUBSETS if name in not_run},
    }
