"""Check names, points and queries before a backend sees them, without any I/O."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant.stores.base import (
    MAX_DIVERSE_HITS,
    MAX_HITS,
    Payload,
    Point,
    Query,
    of_vectors,
)

MAX_COLLECTION_NAME = 255
"""Bytes in the name of a collection, which is the name of a folder in a local store."""
BYTES_PER_VALUE = 26
"""The longest number in JSON is one such as -0.000012345678442216013, with a comma."""
BYTES_PER_POINT = 100


def check_collection_name(name: str) -> None:
    """Refuse a name that Qdrant refuses or that is a path in a local store.

    :raises UsageError: If it is one.
    """
    length = len(name.encode(errors="replace"))
    if not name.strip(".") or length > MAX_COLLECTION_NAME or not name.isprintable() or set(name) & set('<>:"/\\|?*'):
        raise UsageError(
            f"{name!a} is not a valid collection name; use 1 to {MAX_COLLECTION_NAME} bytes of printable text with none"
            ' of < > : " / \\ | ? *'
        )


def check_folder(folder: str | Path, option: str) -> None:
    """Refuse an address where a folder is expected.

    :param option: The keyword that names the folder.
    :raises UsageError: If it is one.
    """
    if re.match("https?:/", str(folder)):
        raise UsageError(
            f"{option} (--{option}) takes a folder, and {folder} is an address; give an address such as"
            " http://localhost:6333 as url (--url)"
        )


def check_url(url: str) -> None:
    """Refuse an address that is not of the form ``http://host:port``.

    :raises UsageError: If it is one.
    """
    if "@" in url:
        raise UsageError(
            "the address of a Qdrant server holds a user name or a password; use an API key (api_key, --api-key)"
        )
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"{url!r} is not the address of a Qdrant server; give one such as http://localhost:6333")


def check_points(points: Sequence[Point], shape: tuple[int, ...]) -> list[int]:
    """Refuse points that a backend refuses or changes.

    :param shape: The shape of an embedding in the collection.
    :returns: The maximum size of each point in bytes, as JSON.
    :raises CocoaError: If a vector is not finite or has another shape, or a payload is not JSON.
    """
    sizes = []
    for point in points:
        name = f"point {point.id} ({point.payload.get('path', 'no path')!a})"
        vectors = [vector for vector in (point.vector, point.caption) if vector is not None]
        size = sum(vector_size(name, vector, shape) for vector in vectors)
        sizes.append(payload_size(name, point.payload) + size + BYTES_PER_POINT)
    return sizes


def vector_size(name: str, vector: np.ndarray, shape: tuple[int, ...]) -> int:
    """Return the maximum size of a vector as JSON, in bytes; of several, the first counts twice, as it is stored twice.

    :raises CocoaError: If it is not finite, or has another shape.
    """
    if vector.shape != shape or not np.isfinite(vector).all():
        expected = " x ".join(map(str, shape))
        raise CocoaError(
            f"{name} has a vector of shape {vector.shape}; expected {expected} finite values; nothing was written"
        )
    return BYTES_PER_VALUE * (vector.size if vector.ndim == 1 else vector.size + vector.shape[1])


def payload_size(name: str, payload: Payload) -> int:
    """Return the size of a payload as JSON, in bytes.

    :raises CocoaError: If it is not JSON: it has a number that is not finite, a lone surrogate, or a Python object.
    """
    try:
        return len(json.dumps(payload, ensure_ascii=False, allow_nan=False).encode("utf-8"))
    except (ValueError, TypeError) as error:
        raise CocoaError(f"{name} has a payload that is not JSON ({error!a}); nothing was written") from error


def check_query(query: Query, shape: tuple[int, ...]) -> Query:
    """Return a query as Qdrant takes it: its vector in float32, and a threshold that equal scores pass.

    Qdrant's score of several vectors is a sum, and so is the threshold.

    :param shape: The shape of an embedding in the collection.
    :raises CocoaError: If the vector is not finite or has another dimension than the collection.
    :raises UsageError: If a number is not one that every backend takes, or the collection has fewer vectors.
    """
    check_numbers(query.limit, query.offset, query.score_threshold, query.diversity)
    if query.vector.shape[-1:] != shape[-1:] or not np.isfinite(query.vector).all():
        raise CocoaError(f"the query's vector has shape {query.vector.shape}; expected {shape[-1]} finite values")
    if query.vectors > (most := 1 if len(shape) == 1 else shape[0]):
        raise UsageError(
            f"vectors is {query.vectors}, but the collection has {of_vectors(most)} per point; give 1 to {most}"
        )
    threshold = query.score_threshold
    if threshold is not None:  # the next smaller float32, as Qdrant leaves out scores that equal the threshold
        threshold = float(np.nextafter(np.float32(threshold * query.vectors), np.float32(-np.inf)))
    return query._replace(vector=np.asarray(query.vector, dtype=np.float32), score_threshold=threshold)


def check_numbers(limit: int, offset: int, score_threshold: float | None, diversity: float | None) -> None:
    """Refuse numbers of a query that not every backend takes.

    :raises UsageError: If one is not a number, or is out of its range.
    """
    given: dict[str, Any] = {"limit": limit, "offset": offset}
    given |= {"score_threshold": score_threshold, "diversity": diversity}
    for name, number in given.items():
        kind: Any = Integral if name in ("limit", "offset") else Real | None
        if not isinstance(number, kind):
            raise UsageError(f"{name} is {number!r}; give a {'whole ' if kind is Integral else ''}number")
    most = MAX_HITS if diversity is None else MAX_DIVERSE_HITS
    if limit < 1 or offset < 0 or limit + offset > most:
        raise UsageError(
            f"limit is {limit} and offset {offset}; limit must be 1 or more, offset 0 or more, and both"
            f" together at most {most}{'' if diversity is None else ' with diversity'}"
        )
    if score_threshold is not None and not math.isfinite(score_threshold):
        raise UsageError(f"score_threshold is {score_threshold}; give a cosine, from -1 to 1")
    if diversity is not None and not 0 <= diversity <= 1:
        raise UsageError(f"diversity is {diversity}; give a number from 0 to 1")
