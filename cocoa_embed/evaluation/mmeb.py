"""Scores a model on MMEB-V1.

Precision@1 is the share of rows whose first candidate, the right one, has the highest cosine of the row's own
candidates, as in VLM2Vec's ``eval.py``, with one difference: where another candidate scores the same, the row counts
as wrong here and as right there. ``tied_rows`` says how many such rows there are.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cocoa_embed.data.mmeb import AVERAGES, SUBSETS
from cocoa_embed.data.rows import Item
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.evaluation.embed import BATCH_TOKENS, Embedded, Role, embed_items, unsupported
from cocoa_embed.evaluation.metrics import cosine_similarities, query_metrics, ranks_of_relevant
from cocoa_embed.evaluation.mmeb_reader import CandidateRow, MmebFolder, SubsetData
from cocoa_embed.evaluation.result_cache import FinishedParts

SCORING = 1
"""Goes up when what is computed from embeddings changes, so that finished subsets are scored again."""

METRICS = ("hit@1", "hit@5", "hit@10", "mrr", "ndcg@5", "ndcg@10")
"""Told beside precision@1, which is the same as hit@1."""


@dataclass(frozen=True)
class CheckedSubset:
    """A subset that was read without fault."""

    name: str
    digest: str
    parts: frozenset[frozenset[str]]


@dataclass(frozen=True)
class RowScores:
    """What came out for each row; all ``[rows]``.

    :param ranks: The rank of the right candidate.
    :param best: The number of the best wrong candidate in the row's own list, 0 where there is none.
    :param margins: The cosine of the right candidate less that of the best wrong one; 0 where there is none.
    """

    ranks: np.ndarray
    best: np.ndarray
    margins: np.ndarray


def check_subsets(folder: MmebFolder, asked: Sequence[str] = ()) -> list[CheckedSubset]:
    """Read all that is to be scored, so that what is wrong with it is told before hours of work.

    :raises CocoaError: If something is wrong with the data; the message says what and where.
    """
    checked = []
    for name in folder.subsets(asked):
        data = folder.read(name)
        checked.append(CheckedSubset(name, data.digest, frozenset(data.parts)))
    return checked


def evaluate_mmeb(
    encoder: Encoder,
    fingerprint: str,
    folder: MmebFolder,
    checked: Sequence[CheckedSubset],
    finished: FinishedParts,
    *,
    batch_tokens: int = BATCH_TOKENS,
    tell: Callable[[str], None] = lambda line: None,
    publish: Callable[[dict[str, Any]], None] = lambda document: None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a model on subsets. Each is written to ``finished`` when it is done, and not done again.

    :param fingerprint: What tells the model from others.
    :param checked: From ``check_subsets``.
    :param tell: Is called with a sentence for each subset.
    :param publish: Is called after each subset with what is returned in the end, as far as it goes.
    :return: What ``summary`` returns.
    :raises CocoaError: If an image cannot be used, the model fails, it can embed nothing, or a result cannot be
        written.
    """
    results: dict[str, Mapping[str, Any]] = {}
    not_run = _not_run(folder, checked)
    for subset in checked:
        if reason := unsupported(encoder, subset.parts):
            not_run[subset.name] = reason
            tell(f"{subset.name}: not run: {reason}")
            continue
        result = finished.read(subset.name, result_key(encoder, fingerprint, subset.digest))
        told = "finished before"
        if result is None:
            data = folder.read(subset.name)
            scored = score_subset(encoder, folder, data, batch_tokens, progress)
            result = finished.write(subset.name, result_key(encoder, fingerprint, data.digest), scored)
            told = f"{result['queries']} queries and {result['targets']} targets embedded, {result['seconds']:.1f} s"
        results[subset.name] = result
        del not_run[subset.name]
        publish(summary(encoder.name, fingerprint, results, not_run))
        tell(f"{subset.name}: precision@1 {result['metrics']['precision@1']:.3f} of {result['rows']} rows ({told})")
    if not results:
        raise CocoaError(f"nothing was run: {not_run[checked[0].name]}; use a model of images and text")
    return summary(encoder.name, fingerprint, results, not_run)


def _not_run(folder: MmebFolder, checked: Sequence[CheckedSubset]) -> dict[str, str]:
    """Return why each subset has no result before the first is run."""
    reasons = dict.fromkeys(SUBSETS, "not in the data")
    reasons |= dict.fromkeys(folder.subsets(), "not asked for")
    return reasons | {subset.name: "not finished" for subset in checked}


def result_key(encoder: Encoder, fingerprint: str, digest: str) -> dict[str, Any]:
    """Return what a subset's result depends on."""
    return {"model": fingerprint, "dimension": encoder.dimension, "data": digest, "scoring": SCORING}


def score_subset(
    encoder: Encoder, folder: MmebFolder, data: SubsetData, batch_tokens: int = BATCH_TOKENS, progress: bool = False
) -> dict[str, Any]:
    """Embed each distinct query and target of a subset once, and score its rows.

    Rows of images that cannot be read are left out where those of missing ones are.

    :return: ``metrics`` (each in [0, 1]), counts, ``partial``, ``seconds``, and what ``RowScores`` has.
    :raises CocoaError: If an image cannot be used and is not left out, or the model fails.
    """
    started = time.perf_counter()

    def embed(items: Sequence[Item], role: Role) -> Embedded:
        return embed_items(
            encoder,
            [item.under(folder.images) for item in items],
            role,
            batch_tokens,
            leave_out_broken=folder.skip_missing_images,
            progress=f"{data.name}, {role}" if progress else None,
        )

    try:
        queries, targets = embed(data.queries, "query"), embed(data.targets, "document")
    except ImageError as error:
        raise CocoaError(
            f"{data.name}: {error}; get the image anew, or leave its rows out with --missing-images skip"
        ) from error
    rows = [
        row
        for row in data.rows
        if row.query not in queries.broken and targets.broken.keys().isdisjoint(row.targets.tolist())
    ]
    if not rows:
        raise CocoaError(f"{data.name}: every one of its rows has an image that is missing or cannot be read")
    scores = score_rows(rows, queries.vectors, targets.vectors)
    return {
        "subset": data.name,
        "model": encoder.name,
        "metrics": metrics_of_ranks(scores.ranks),
        "rows": len(rows),
        "rows_in_data": data.rows_in_data,
        "rows_without_image": data.rows_without_image + len(data.rows) - len(rows),
        "rows_merged": data.rows_merged,
        "tied_rows": int(((scores.margins == 0) & (scores.best > 0)).sum()),
        "partial": len(rows) < data.rows_in_data,
        "queries": len(data.queries),
        "targets": len(data.targets),
        "seconds": round(time.perf_counter() - started, 2),
        "places": [row.source for row in rows],
        **{name: values.tolist() for name, values in dataclasses.asdict(scores).items()},
    }


def score_rows(rows: Sequence[CandidateRow], queries: np.ndarray, targets: np.ndarray) -> RowScores:
    """Compare each row's query with its own candidates.

    :param queries: Embeddings by a row's ``query``, float ``[queries, dimension]``.
    :param targets: Embeddings by a row's ``targets``, float ``[targets, dimension]``.
    """
    ranks, best, margins = [], [], []
    for row in rows:
        similarities = cosine_similarities(queries[row.query][None], targets[row.targets])[0]
        ranks.append(ranks_of_relevant(similarities, np.array([0]))[0])
        wrong = similarities[1:]
        best.append(int(wrong.argmax()) + 1 if len(wrong) else 0)
        margins.append(float(similarities[0] - wrong.max()) if len(wrong) else 0.0)
    return RowScores(np.array(ranks), np.array(best), np.array(margins))


def metrics_of_ranks(ranks: np.ndarray) -> dict[str, float]:
    """Return precision@1 and ``METRICS`` of the ranks of the right candidates."""
    of_queries = query_metrics([np.array([rank]) for rank in ranks])
    return {"precision@1": float((ranks == 1).mean()), **{name: float(of_queries[name].mean()) for name in METRICS}}


TOLD = ("rows", "rows_in_data", "rows_without_image", "rows_merged", "tied_rows", "partial", "queries", "targets",
        "seconds")  # fmt: skip
"""What of a subset's result stands in the summary, besides the metrics."""


def summary(
    model: str, fingerprint: str, results: Mapping[str, Mapping[str, Any]], not_run: Mapping[str, str]
) -> dict[str, Any]:
    """Return what programs read.

    :param results: From ``score_subset``, by subset.
    :param not_run: Why the other subsets were not run.
    :return: ``subsets``: metrics and counts by name. ``averages``: the mean precision@1 over the subsets that were run,
        by ``AVERAGES``, None where none was. ``coverage``: for each average ``run``, ``of`` and ``complete``, which
        is true if every subset of it was run on all its rows. ``not_run``: reasons by name.
    """
    averages: dict[str, float | None] = {}
    coverage: dict[str, dict[str, Any]] = {}
    for average in AVERAGES:
        members = [name for name, subset in SUBSETS.items() if average in subset.averages]
        run = [results[name] for name in members if name in results]
        averages[average] = float(np.mean([each["metrics"]["precision@1"] for each in run])) if run else None
        is_complete = len(run) == len(members) and not any(each["partial"] for each in run)
        coverage[average] = {"run": len(run), "of": len(members), "complete": is_complete}
    subsets = {
        name: {
            **result["metrics"],
            **{told: result[told] for told in TOLD},
            "meta_task": SUBSETS[name].meta_task,
            "in_domain": SUBSETS[name].in_domain,
        }
        for name, result in results.items()
    }
    return {
        "benchmark": "MMEB-V1",
        "model": model,
        "fingerprint": fingerprint,
        "subsets": subsets,
        "averages": averages,
        "coverage": coverage,
        "not_run": {name: not_run[name] for name in SUBSETS if name in not_run},
    }
