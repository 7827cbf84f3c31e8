"""Search a collection by texts, images and examples: embed all queries at once, and send them as one request."""

from __future__ import annotations

import asyncio
import functools
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
from PIL import Image
from qdrant_client import models

from cocoa_embed.encode.encoder import ModelInput, make_input
from cocoa_embed.encode.vectors import unit
from cocoa_embed.errors import CocoaError, UsageError, printable
from cocoa_embed.images.file_names import as_on_disk
from cocoa_embed.images.load import ImageSource
from cocoa_embed.integrations.qdrant.searching.conditions import Exists, field_paths, normal_forms, on_paths
from cocoa_embed.integrations.qdrant.searching.options import SearchOptions
from cocoa_embed.integrations.qdrant.searching.payload_keys import create_index, refuse_unknown_keys, values
from cocoa_embed.integrations.qdrant.stores.base import (
    MAX_HITS,
    MIN_CANDIDATES,
    Hit,
    Query,
    StoredPoint,
    of_vectors,
)
from cocoa_embed.integrations.qdrant.stores.client_filters import Filter, read_conditions, read_filter
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import storable

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Example: TypeAlias = str | int | Path | Hit
"""An indexed image: its path, the id of its point, or a hit."""
QueryLike: TypeAlias = str | Mapping[str, Any]
"""A text, or a mapping with ``text``, ``image``, ``like`` and ``unlike``, as ``search`` takes them."""


class NotIndexedError(CocoaError):
    """The collection does not hold an image."""


def in_thread(method: Callable[Arguments, Result]) -> Callable[Arguments, Awaitable[Result]]:
    """Return a method that runs another one in a thread, so that an event loop can await it."""

    @functools.wraps(method)
    async def run(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        return await asyncio.to_thread(method, *args, **options)

    return run


class Searcher(ABC):
    """Searches the collection of a store; a subclass embeds the queries."""

    store: Store

    @abstractmethod
    def _embed_queries(self, items: Sequence[ModelInput], vectors: int) -> np.ndarray:
        """Embed queries with the model of the collection; float32, of shape ``(len(items), dimension)``.

        :param vectors: If more than one, ``(len(items), vectors, dimension)``.
        """

    def search(
        self,
        text: str | None = None,
        image: ImageSource | None = None,
        *,
        like: Example | Sequence[Example] = (),
        unlike: Example | Sequence[Example] = (),
        limit: int = 10,
        offset: int = 0,
        score_threshold: float | None = None,
        query_filter: Filter = None,
        any_orientation: bool = False,
        diversity: float | None = None,
        group_by: str | None = None,
        hnsw_ef: int | None = None,
        exact: bool = False,
        vectors: int = 1,
    ) -> list[Hit]:
        """Return the images nearest to a text, to an image, to indexed images, or to all of them, best first.

        :param text: Always text, even if it is the name of a file or an address.
        :param image: A path, bytes, a ``BytesIO``, a ``data:`` address or a PIL image. With a text, both are one query.
        :param like: Indexed images that hits should resemble: paths, ids or hits. They are not hits themselves. Without
            text and image, no model is loaded.
        :param unlike: Indexed images that hits should not resemble.
        :param limit: The maximum number of hits.
        :param offset: The number of best hits to skip.
        :param score_threshold: The minimum cosine of a hit.
        :param query_filter: Conditions on the payload that must all hold, such as ``["mime=image/png", "width>=800"]``
            (see ``parse_filters``), or a Qdrant filter.
        :param any_orientation: Whether to search for the rotated and mirrored image too; the score of a hit is the best
            of the eight.
        :param diversity: From 0 (the nearest) to 1 (hits as different from each other as possible), by maximal marginal
            relevance.
        :param group_by: A key of the payload, such as ``album``: of all images with one value, only the best is a hit.
        :param hnsw_ef: How many candidates the search index of a server or of Edge considers: more are slower, and find
            more of the nearest.
        :param exact: Whether to compare all vectors instead, as they are stored: slow, but finds all of the nearest.
        :param vectors: For a model of several vectors, how many of the query's to use. The first finds candidates;
            their score is the mean, over those used, of the best cosine to one of the image's vectors (MaxSim). With 1,
            it is the cosine of the first vectors.
        :raises UsageError: If there is nothing to search for, a number or a condition is invalid, or nothing is found
            because no image has a key of the filter, or no image has the key ``group_by``.
        :raises CocoaError: If there is no such collection, another model made it, or it does not hold an example.
        """
        options = SearchOptions(
            limit=limit,
            offset=offset,
            score_threshold=score_threshold,
            query_filter=query_filter,
            any_orientation=any_orientation,
            diversity=diversity,
            group_by=group_by,
            hnsw_ef=hnsw_ef,
            exact=exact,
            vectors=vectors,
        )
        return self._search([{"text": text, "image": image, "like": like, "unlike": unlike}], options)[0]

    def search_many(self, queries: Iterable[QueryLike], **options: Any) -> list[list[Hit]]:
        """Return the hits of each of several queries, which are embedded together and sent as one request.

        :param queries: Texts, or mappings with ``text``, ``image``, ``like`` and ``unlike``.
        :param options: Options of ``search``, from ``limit`` on.
        :raises UsageError: As ``search`` does.
        :raises CocoaError: As ``search`` does.
        """
        if isinstance(queries, str):
            raise UsageError("queries is a text; give a list of texts")
        listed = [{"text": query} if isinstance(query, str) else query for query in queries]
        return self._search(listed, SearchOptions(**options)) if listed else []

    asearch = in_thread(search)
    asearch_many = in_thread(search_many)

    def create_payload_index(self, key: str, kind: str | None = None) -> str:
        """Create an index for filters on a key: a server in strict mode needs it, and others filter faster with it.

        :param key: The key as in a filter: ``licence`` is the column of that name.
        :param kind: ``keyword`` (whole texts), ``text`` (words), ``integer``, ``float``, ``bool`` or ``datetime``
            [default: what the values of some images are].
        :returns: The path of the field that the index is on.
        :raises UsageError: If the type is not given and cannot be inferred.
        """
        self.store.require_signature()
        return create_index(self.store, key, kind)[0]

    def _search(self, queries: Sequence[Mapping[str, Any]], options: SearchOptions) -> list[list[Hit]]:
        inputs = [query_inputs(query, options.any_orientation) for query in queries]
        conditions = read_conditions(options.query_filter)
        self._check_vectors(options.vectors)
        filter_ = read_filter(conditions, self.store.payload_indexes())
        examples = self._find_examples(queries)
        flat = list(chain.from_iterable(inputs))
        embedded = iter(self._embed_queries(flat, options.vectors) if flat else ())
        plain = Query(
            np.empty(0),
            options.limit,
            options.offset,
            options.score_threshold,
            diversity=options.diversity,
            hnsw_ef=options.hnsw_ef,
            exact=options.exact,
        )
        searches = [
            [
                plain._replace(
                    vector=combine(next(embedded) if each else None, used, options.vectors),
                    filter=without(filter_, used),
                )
                for _ in each or (None,)
            ]
            for each, used in zip(inputs, examples, strict=True)
        ]
        if options.any_orientation or options.group_by is not None:
            hits = [self._merged(each, options) for each in searches]
        else:
            hits = self.store.search_batch([query for (query,) in searches])
        if conditions and not any(hits):
            refuse_unknown_keys(self.store, conditions)
        if options.group_by is not None:
            self._refuse_unknown_group(options.group_by, hits)
        return hits

    def _refuse_unknown_group(self, key: str, hits: Iterable[list[Hit]]) -> None:
        """Check that an image has the key by which hits are grouped."""
        paths = field_paths(key)
        if not any(True for hit in chain.from_iterable(hits) for path in paths for _ in values(hit.payload, path)):
            refuse_unknown_keys(self.store, [on_paths(key, Exists)], "nothing was grouped")

    def _check_vectors(self, vectors: int) -> None:
        """Check that the collection has at least ``vectors`` vectors per point."""
        signature = self.store.require_signature()
        if vectors > signature.vectors:
            remedy = f"give 1 to {signature.vectors}" if signature.vectors > 1 else "leave vectors out (--vectors)"
            raise UsageError(
                f"vectors is {vectors}, but {self.store.name} has {of_vectors(signature.vectors)} per point; {remedy}"
            )

    def _merged(self, searches: Sequence[Query], options: SearchOptions) -> list[Hit]:
        """Return the hits of several searches as one list, of which each group has only the best."""
        needed = options.offset + options.limit
        size = needed if options.group_by is None else MIN_CANDIDATES
        while options.group_by is not None and size < 4 * needed:
            size *= 4  # in large steps, as ranks that are fused differ a little with the size
        while True:
            size = min(size, MAX_HITS)
            found = self.store.search_batch([query._replace(limit=size, offset=0) for query in searches])
            hits = best_hits(found)
            if options.group_by is not None:
                hits = first_of_groups(hits, field_paths(options.group_by))
            if len(hits) >= needed or all(len(each) < size for each in found) or size == MAX_HITS:
                return hits[options.offset : needed]
            size *= 4

    def _find_examples(self, queries: Sequence[Mapping[str, Any]]) -> list[Examples]:
        """Read the vectors of all examples with one request."""
        named = [[listed(query.get(side)) for side in ("like", "unlike")] for query in queries]
        names = {name for sides in named for side in sides for name in side}
        if not names:
            return [Examples([], [])] * len(queries)
        ids: list[Any] = [id_ for name in names if (id_ := as_id(name)) is not None]
        paths = sorted({path for name in names for path in spelled_paths(name)})
        clauses = [
            models.FieldCondition(key="paths", match=models.MatchAny(any=paths)),
            models.FieldCondition(key="path", match=models.MatchAny(any=paths)),
            *([models.HasIdCondition(has_id=ids)] if ids else []),
        ]
        found: dict[str, StoredPoint] = {}
        for point in self.store.points(models.Filter(should=clauses), with_vectors=True):
            stored = (point.payload.get("path"), *(point.payload.get("paths") or ()))
            found |= dict.fromkeys((point.id, *(path for path in stored if isinstance(path, str))), point)
        return [Examples(*([self._example(found, name) for name in side] for side in sides)) for sides in named]

    def _example(self, found: Mapping[str, StoredPoint], name: str) -> StoredPoint:
        for key in (name, str(as_id(name)), *spelled_paths(name)):
            if key in found:
                return found[key]
        raise NotIndexedError(
            f"{self.store.name} has no image {printable(name)}; give the path or the id of one that is indexed, or"
            " search by image, which embeds it"
        )


@dataclass(frozen=True)
class Examples:
    """The indexed images that a query names."""

    like: list[StoredPoint]
    unlike: list[StoredPoint]


def query_inputs(query: Mapping[str, Any], any_orientation: bool) -> list[ModelInput]:
    """Return what the model embeds of a query: nothing for examples alone, or one input for each orientation.

    :raises UsageError: If there is nothing to search for.
    :raises ImageError: If the image cannot be used.
    """
    if not isinstance(query, Mapping):
        raise UsageError(
            f"a query is a {type(query).__name__}; give a text, or a mapping with text, image, like, unlike"
        )
    if unknown := sorted(query.keys() - {"text", "image", "like", "unlike"}):
        raise UsageError(f"a query has the key {unknown[0]!r}; it can have text, image, like and unlike")
    text, image = query.get("text"), query.get("image")
    if not text and image is None:
        if not listed(query.get("like")):
            raise UsageError("there is nothing to search for; give a text, an image, or like, or several of them")
        return orientations({}) if any_orientation else []
    item = make_input(text, image)
    return orientations(item) if any_orientation else [item]


def listed(examples: Any) -> list[str]:  # noqa: ANN401
    """Return the names of one example or several.

    :raises UsageError: If one is neither a path nor an id nor a hit.
    """
    several = isinstance(examples, Sequence) and not isinstance(examples, str)
    names = list(examples) if several else [] if examples is None else [examples]
    for name in names:
        if not isinstance(name, (str, int, Path, Hit)):
            raise UsageError(
                f"an example is a {type(name).__name__}; give the path or the id of an indexed image, or a hit"
            )
    return [name.id if isinstance(name, Hit) else str(name) for name in names]


def spelled_paths(name: str) -> list[str]:
    """Return the paths by which an index may know an image: file systems differ in how accents are composed."""
    path = os.path.abspath(name)
    return [storable(form) for each in (name, path, str(as_on_disk(Path(path)))) for form in normal_forms(each)]


def as_id(name: str) -> str | int | None:
    """Return the id of a point, if a name can be one."""
    try:
        return int(name) if name.isdecimal() else str(uuid.UUID(name))
    except ValueError:
        return None


def combine(query: np.ndarray | None, examples: Examples, vectors: int) -> np.ndarray:
    """Return the vector to search for: the mean of query and liked examples, moved away from the mean of the others.

    This is Qdrant's strategy ``average_vector``, on vectors of length 1.

    :param query: float32, shape ``(dimension,)``, or ``(vectors, dimension)``.
    :param vectors: How many of an example's vectors are combined, each with the query's of the same number.
    """
    if query is not None and not (examples.like or examples.unlike):
        return query
    like, unlike = (
        [each.vector if vectors == 1 or each.vectors is None else each.vectors[:vectors] for each in side]
        for side in (examples.like, examples.unlike)
    )
    mean = np.mean([unit(np.asarray(vector)) for vector in ([] if query is None else [query]) + like], axis=0)
    if unlike:
        mean = 2 * mean - np.mean([unit(np.asarray(vector)) for vector in unlike], axis=0)
    return unit(mean)


def without(query_filter: models.Filter | None, examples: Examples) -> models.Filter | None:
    """Return a filter that also leaves out the examples."""
    ids: list[Any] = [as_id(each.id) for each in (*examples.like, *examples.unlike)]
    if not ids:
        return query_filter
    return models.Filter(must=query_filter, must_not=[models.HasIdCondition(has_id=ids)])


def orientations(item: ModelInput) -> list[ModelInput]:
    """Return a query with its image in each of the eight orientations.

    :raises UsageError: If it has no image.
    """
    image = item.get("image")
    if not isinstance(image, Image.Image):
        raise UsageError("any_orientation turns the image of a query, and this query has none; give an image")
    return [item, *({**item, "image": image.transpose(turn)} for turn in Image.Transpose)]


def best_hits(searches: Iterable[list[Hit]]) -> list[Hit]:
    """Return the hits of several searches, each point once with its best score, best first."""
    best: dict[str, Hit] = {}
    for hit in sorted(chain.from_iterable(searches), key=lambda hit: -hit.score):
        best.setdefault(hit.id, hit)
    return list(best.values())


def first_of_groups(hits: Iterable[Hit], paths: Sequence[str]) -> list[Hit]:
    """Return the first hit of each group: those with the same values at the first path where they have any.

    A hit without a value is a group of its own.
    """
    groups: dict[str, Hit] = {}
    for hit in hits:
        found = next(filter(None, (list(values(hit.payload, path)) for path in paths)), None)
        groups.setdefault(hit.id if found is None else repr(found), hit)
    return list(groups.values())
