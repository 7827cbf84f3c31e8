"""What storage backends take and return: ``Point``, ``Query``, ``Hit``, ``Signature``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant.points import REVISION, Payload
from cocoa_embed.sources.files import is_deleted

if TYPE_CHECKING:
    from qdrant_client import models

    from cocoa_embed.encode.encoder import Encoder

KEYWORD, INTEGER, FLOAT, TEXT, BOOL, DATETIME = "keyword", "integer", "float", "text", "bool", "datetime"
TENANT = "tenant"
"""The type of a keyword index whose values decide which points are stored together."""
PAYLOAD_INDEXES = {
    **dict.fromkeys(("path", "relative_path", "paths", "sha256", "mime", "shard"), KEYWORD),
    **dict.fromkeys(("width", "height", "bytes", REVISION), INTEGER),
    "mtime": FLOAT,
    "caption": TEXT,
}
"""The payload indexes of a collection and their types, for the backends that have payload indexes."""

EMBEDS = (IMAGE, TOGETHER, BOTH) = ("image", "image+caption", "both")
"""What is embedded: the image alone; the image and its caption in one vector; each in its own vector."""
IMAGE_VECTOR, CAPTION_VECTOR = "image", "caption"
"""The names of the vectors where there are two."""

ALL_VECTORS = "all"
"""The name of the multivector that holds all vectors of a model of several; the first alone has no name."""

MEMORY = ":memory:"
"""The client's name for a local store without a folder, which is gone when the process ends."""
MAX_HITS = 2**31 - 1
"""The maximum number of hits of a search, including those that it skips."""
MAX_DIVERSE_HITS = 2**14
"""The same, if diversity chooses among candidates."""
DIVERSE_CANDIDATES = 4
"""Candidates per hit that diversity chooses from, and at least twice ``MIN_CANDIDATES`` in total."""
MIN_CANDIDATES = 200
MIN_OVERSAMPLING = 3.0


class Point(NamedTuple):
    """A stored image content."""

    id: str
    """A UUID, in lower case and with hyphens."""
    vector: np.ndarray
    """float32, shape ``(dimension,)``, or ``(vectors, dimension)`` for a model of several vectors."""
    payload: Payload
    """A JSON object."""
    caption: np.ndarray | None = None
    """The vector of the caption, if it has its own: float32, shape ``(dimension,)``."""

    def vectors(self, embed: str) -> Any:  # noqa: ANN401 - as the clients of Qdrant take them
        """Return the values of the one vector, or of both by name; a point without a caption has no vector for it."""
        if embed != BOTH:
            return unnamed(self.vector)
        caption = {} if self.caption is None else {CAPTION_VECTOR: self.caption.tolist()}
        return {IMAGE_VECTOR: self.vector.tolist(), **caption}


class NewVector(NamedTuple):
    """The new value of one vector of a stored point."""

    name: str
    """The name of the vector; empty if points have one vector."""
    values: np.ndarray | None
    """float32, of the shape of ``Point.vector``; None removes the vector."""

    @property
    def named(self) -> Any:  # noqa: ANN401
        """The values as the clients of Qdrant take them."""
        assert self.values is not None
        return {self.name: self.values.tolist()} if self.name else unnamed(self.values)


def unnamed(vector: np.ndarray) -> Any:  # noqa: ANN401
    """Return the values of a vector, or of the first of several and of all, as the clients of Qdrant take them."""
    return vector.tolist() if vector.ndim == 1 else {"": vector[0].tolist(), ALL_VECTORS: vector.tolist()}


class Replacement(NamedTuple):
    """A change of a stored point, which is made only if nothing else has changed it since it was read."""

    id: str
    revision: int | None
    """The revision of the payload when it was read; None if it had none."""
    payload: Payload | None
    """The new payload; None deletes the point."""
    size: int
    """The size of the payload and the vector, in bytes."""
    vector: NewVector | None = None
    """None if the vectors stay as they are."""


class Query(NamedTuple):
    """A vector search."""

    vector: np.ndarray
    """float32, shape ``(dimension,)``; or ``(vectors, dimension)``: the first finds candidates, all rescore them."""
    limit: int
    """The maximum number of hits."""
    offset: int = 0
    """The number of best hits to skip."""
    score_threshold: float | None = None
    """The minimum cosine of a hit."""
    filter: models.Filter | None = None
    """Conditions on the payload."""
    diversity: float | None = None
    """From 0 (the nearest) to 1 (the most different from each other): maximal marginal relevance."""
    hnsw_ef: int | None = None
    """How many candidates the search index considers: more are slower and find more."""
    exact: bool = False
    """Whether to compare all vectors, without the search index and the quantized vectors."""

    @property
    def vectors(self) -> int:
        """How many vectors are compared with those of a point."""
        return 1 if self.vector.ndim == 1 else len(self.vector)

    @property
    def candidates(self) -> int:
        """The number of nearest points that diversity chooses from, and that are fused or rescored.

        It is the same for all pages of a search within that number of hits, so that they are parts of one ranking. It
        doubles for deeper pages, which may repeat or miss a few hits.
        """
        count = max(DIVERSE_CANDIDATES * self.limit, 2 * MIN_CANDIDATES)
        while count < self.limit + self.offset:
            count *= 2
        return min(count, MAX_DIVERSE_HITS)

    @property
    def of_each_vector(self) -> Query:
        """The search of one of two vectors; it finds more than ``limit``, as their hits are fused by rank."""
        return self._replace(limit=max(self.candidates, self.limit + self.offset), offset=0, diversity=None)

    @property
    def of_first_vector(self) -> Query:
        """The search by the first of several vectors, for the candidates that all vectors rescore."""
        return self.of_each_vector._replace(vector=self.vector[0], score_threshold=None)


class StoredPoint(NamedTuple):
    """A point as it is stored."""

    id: str
    payload: Payload
    vector: np.ndarray | None
    """float32, shape ``(dimension,)``; None if it was not requested."""
    caption: np.ndarray | None = None
    """The vector of the caption, if it has its own: float32, shape ``(dimension,)``."""
    vectors: np.ndarray | None = None
    """All vectors, for a model of several; shape ``(vectors, dimension)``."""


@dataclass(frozen=True)
class Hit:
    """A point found by a search; ``score`` is the cosine of its vector and the query's.

    With several vectors, it is the mean, over the query's, of the best cosine to one of the point's.
    """

    id: str
    score: float
    path: str
    payload: Payload

    @property
    def caption(self) -> str:
        """The caption; empty if there is none or if the payload has something other than text there."""
        caption = self.payload.get("caption")
        return caption if isinstance(caption, str) else ""


@dataclass(frozen=True)
class Signature:
    """The model that made the vectors of a collection."""

    model: str
    """The name for messages."""
    fingerprint: str | None
    """In hexadecimal; None in a collection that another program made."""
    dimension: int
    embed: str = IMAGE
    """One of ``EMBEDS``."""
    vectors: int = 1
    """The number of vectors per point."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an embedding."""
        return (self.dimension,) if self.vectors == 1 else (self.vectors, self.dimension)

    def require(self, other: Signature, name: str, kind: str) -> None:
        """Check that embeddings with another signature are compatible with those of this one.

        :param name: The ``kind``, such as a collection, that has this signature, for messages.
        :raises CocoaError: If the model, the dimension, what is embedded or the number of vectors differs.
        """
        self.require_vectors(other.vectors, other.model, name, kind)
        if self.fingerprint not in (None, other.fingerprint) or self.dimension != other.dimension:
            raise CocoaError(
                f"{name} was made with {self.model} ({self.dimension} dimensions), not with {other.model}"
                f" ({other.dimension}); choose another {kind}, or give the model that made it, with the same"
                " --max-pixels"
            )
        if self.embed != other.embed:
            raise CocoaError(
                f"{name} was made with --embed {self.embed}, not with --embed {other.embed}; choose another {kind}"
            )

    def require_vectors(self, count: int, model: str, name: str, kind: str) -> None:
        """Check that embeddings of a model of ``count`` vectors are compatible with this signature.

        :param name: The ``kind``, such as a collection, that has this signature, for messages.
        :raises CocoaError: If its points have another number of vectors.
        """
        if self.vectors != count:
            of_one = "the export of the model with --vectors 1"
            remedy = of_one if self.vectors == 1 else f"the model that made it ({self.model})"
            raise CocoaError(
                f"{name} has {of_vectors(self.vectors)} per point, but {model} makes {of_vectors(count)};"
                f" choose another {kind}, or {remedy}"
            )


def signature_of(encoder: Encoder, embed: str) -> Signature:
    """Return the signature of what a model embeds.

    :param embed: What is embedded for an image: one of ``EMBEDS``.
    :raises CocoaError: If the model does not embed that.
    :raises UsageError: If the image would have several vectors and its caption another.
    """
    encoder.require_images(with_text=embed == TOGETHER)
    vectors = encoder.most_vectors
    if embed == BOTH and vectors > 1:
        raise UsageError(
            f"--embed both keeps one vector of an image and one of its caption, but the model makes {vectors}; give"
            " --embed image or image+caption, or the export of the model with --vectors 1"
        )
    return Signature(encoder.name, encoder.fingerprint, encoder.dimension, embed, vectors)


def of_vectors(count: int) -> str:
    """Return a number of vectors in words."""
    return "one vector" if count == 1 else f"{count} vectors"


def with_any_of(key: str, values: Sequence[str]) -> models.Filter:
    """Return the filter for the points whose payload has one of these values under a key."""
    from qdrant_client import models

    match = models.MatchAny(any=list(values))
    return models.Filter(must=[models.FieldCondition(key=key, match=match)])


def oversampling(limit: int) -> float:
    """Return how many quantized candidates per hit to rescore: at least 3, and at least 200 in total.

    With one bit per value, twice ``limit`` candidates miss some of the nearest points; rescoring 200 costs little.
    """
    return max(MIN_OVERSAMPLING, MIN_CANDIDATES / limit)


def image_path(payload: Payload) -> str:
    """Return the path of a point's image, also from a node that LlamaIndex wrote; empty if there is none.

    It is the first of ``paths`` that exists; ``path`` if none exists, as when the files are on another machine.
    """
    if paths := payload.get("paths"):
        existing = (path for path in paths if isinstance(path, str) and not is_deleted(path))
        return str(next(existing, payload.get("path", "")))
    if "path" in payload or "_node_content" not in payload:
        return str(payload.get("path", ""))
    try:
        return str(json.loads(payload["_node_content"]).get("image_path") or "")
    except (ValueError, TypeError, AttributeError):  # another program may have written anything
        return ""
