"""What no home of points may be given: names, addresses, points, queries and collections that are refused. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

import numpy as np

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant.stores.base import Payload, Point, Signature, Store

MAX_COLLECTION_NAME = 255
"""Bytes in the name of a collection, which is a folder's name in a local store."""
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def check_collection_name(name: str) -> None:
    """Refuse a name that Qdrant refuses, or that would be a path of its own in a local store.

    :raises UsageError: If it is one.
    """
    length = len(name.encode(errors="replace"))
    if not name.strip(".") or length > MAX_COLLECTION_NAME or not name.isprintable() or set(name) & set('<>:"/\\|?*'):
        raise UsageError(
            f"{name!a} is no name for a collection; use 1 to {MAX_COLLECTION_NAME} bytes, printable, and none of"
            ' < > : " / \\ | ? *'
        )


def check_url(url: str) -> None:
    """Refuse an address that is not of the form ``http://host:port``.

    :raises UsageError: If it is one.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if is_address and "@" in parts.netloc:
        raise UsageError("the address of a Qdrant server holds a user name or a password; give the server's api_key")
    if not is_address or not url.isprintable():
        raise UsageError(f"{url!r} is no address of a Qdrant server; give one such as http://localhost:6333")


def check_points(points: Sequence[Point], dimension: int | None = None) -> list[int]:
    """Refuse points that a home of points refuses, or takes and gives back as something else.

    :param dimension: Of the collection, if it is known.
    :return: The bytes that each takes as JSON, at most.
    :raises CocoaError: If an id is no UUID, a vector is not finite or of another dimension than it should be, or a
        payload is not JSON.
    """
    sizes = []
    for point in points:
        name = f"point {point.id} ({point.payload.get('path', 'no path')!a})"
        if _UUID.fullmatch(point.id) is None:
            raise CocoaError(f"{name} has an id that is no UUID in lower case; nothing was written")
        if point.vector.ndim != 1 or point.vector.size != (dimension or point.vector.size):
            raise CocoaError(
                f"{name} has a vector of shape {point.vector.shape}, the collection holds vectors of"
                f" {dimension or 'one'} dimension(s); nothing was written"
            )
        if not np.isfinite(point.vector).all():
            raise CocoaError(f"{name} has a vector that is not finite; nothing was written")
        # The longest number is one such as -0.000012345678442216013, with a comma.
        sizes.append(payload_size(name, point.payload) + 26 * point.vector.size + 100)
    return sizes


def payload_size(name: str, payload: Payload) -> int:
    """Return the bytes that a payload takes as JSON, at most.

    :raises CocoaError: If it is no JSON: a number that is not finite, a lone surrogate, an object of Python's.
    """
    try:
        return len(json.dumps(payload, allow_nan=False, ensure_ascii=False).encode())
    except (ValueError, TypeError) as error:
        raise CocoaError(f"{name} has a payload that is not JSON ({error}); nothing was written") from error


def query_values(vector: np.ndarray, dimension: int | None = None) -> list[float]:
    """Return a query's vector as numbers.

    :raises CocoaError: If it is not finite, or not of the collection's dimension.
    """
    if dimension is not None and vector.shape != (dimension,):
        raise CocoaError(f"the query's vector is of shape {vector.shape}, those in the collection of ({dimension},)")
    if not np.isfinite(vector).all():
        raise CocoaError("the query's vector is not finite")
    return np.asarray(vector, dtype=np.float32).tolist()


def check_vectors(store: Store, names: Sequence[str], *, size: int, distance: str) -> None:
    """Refuse a collection that holds anything but one unnamed vector a point, compared by the cosine.

    :param names: Of the vectors of a point; the unnamed one is called "".
    :param size: The dimension of the unnamed vector, if there is one.
    :param distance: How the unnamed vector is compared, if there is one.
    :raises CocoaError: If it is one.
    """
    if list(names) != [""]:
        raise CocoaError(
            f"collection {store.collection!r} in {store.place} holds named vectors ({', '.join(names)}),"
            " not the one unnamed vector that this indexer writes; choose another collection"
        )
    if distance != "Cosine":
        raise CocoaError(
            f"collection {store.collection!r} in {store.place} holds vectors of {size} dimensions ({distance}), this"
            f" indexer writes {size} (Cosine); choose another collection"
        )


def check_may_sign(store: Store, found: Signature | None, signature: Signature) -> None:
    """Refuse to write ``signature`` over another one, or into what cannot bear it.

    :raises CocoaError: If the collection is not there, has another signature, or other vectors.
    """
    if found is None:
        raise CocoaError(f"there is no collection {store.collection!r} in {store.place} to sign")
    if found.dimension != signature.dimension:
        raise CocoaError(
            f"collection {store.collection!r} in {store.place} holds vectors of {found.dimension} dimensions,"
            f" {signature.model} makes {signature.dimension}; choose another collection"
        )
    if found.fingerprint not in (None, signature.fingerprint):
        raise CocoaError(
            f"collection {store.collection!r} in {store.place} was made with {found.model}, not with"
            f" {signature.model}; choose another collection"
        )
