"""How a backend connects, and how a new collection stores its points."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cocoa_embed.errors import UsageError, did_you_mean
from cocoa_embed.integrations.qdrant.stores import base

CHOICES = {
    "vectors": ("float32", "float16"),
    "quantization": ("scalar", "binary", "turbo", "turbo2", "turbo1"),
    "memory": ("cached", "cold"),
    "graph": ("pinned", "cached", "cold"),
    "hnsw": ("during", "after"),
}
TURBO_BITS = {"turbo": 4, "turbo2": 2, "turbo1": 1}
"""Bits per value of TurboQuant."""
NUMBERS = ("shards", "replicas")
CREATE_KEYS = (*CHOICES, *NUMBERS, "tenant")
"""The options that count when a collection is created."""


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How a backend connects, and how a new collection stores its points."""

    api_key: str | None = field(default=None, repr=False)
    """API key for the Qdrant server; other backends ignore it."""
    prefer_grpc: bool = False
    """Whether to use gRPC for the server, on port 6334."""
    vectors: Literal["float32", "float16"] | None = None
    """The type of the values of original vectors."""
    quantization: Literal["scalar", "binary", "turbo", "turbo2", "turbo1"] | None = None
    """Search vectors of one byte per value (scalar), one bit (binary), or 4, 2 or 1 bits (TurboQuant), in memory; then
    rescore the best with the originals."""
    memory: Literal["cached", "cold"] | None = None
    """Whether original vectors are read into memory at the start (cached), or from disk when needed (cold)."""
    graph: Literal["pinned", "cached", "cold"] | None = None
    """The same for the graph of the search index, which can also be kept from being evicted (pinned)."""
    hnsw: Literal["during", "after"] | None = None
    """Whether a server builds the search index while points arrive, or when the first run is complete."""
    shards: int | None = None
    replicas: int | None = None
    """How many machines hold each shard."""
    tenant: str | None = None
    """A key by whose values a server stores points together, for collections where most searches filter on it."""

    def __post_init__(self) -> None:
        given = asdict(self)
        for name, choices in CHOICES.items():
            if given[name] is not None and given[name] not in choices:
                raise UsageError(f"{name} is {given[name]!r}; it can be {', '.join(choices)}")
        for name in NUMBERS:
            if given[name] is not None and (type(given[name]) is not int or given[name] < 1):
                raise UsageError(f"{name} is {given[name]!r}; it must be a whole number of 1 or more")
        if self.tenant is not None and not self.tenant.strip():
            raise UsageError("tenant is empty; give a key, such as user")

    def refuse(self, place: str, lacking: Collection[str], instead: str) -> None:
        """Refuse options that a backend lacks.

        :raises UsageError: If one is given.
        """
        given = [name for name, value in asdict(self).items() if name in lacking and value not in (None, False)]
        if given:
            raise UsageError(f"{place} has no {' and no '.join(given)}; give {instead} for that")

    def payload_indexes(self) -> Mapping[str, str]:
        """Return the payload indexes of a new collection and their types."""
        if self.tenant is None:
            return base.PAYLOAD_INDEXES
        is_own = self.tenant in base.PAYLOAD_INDEXES or self.tenant.startswith("metadata.")
        return {**base.PAYLOAD_INDEXES, self.tenant if is_own else f"metadata.{self.tenant}": base.TENANT}


def read_create(create: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return creation options by name.

    :param create: Such as ``{"shards": 4, "hnsw": "after"}``, or the same as ``shards=4,hnsw=after``.
    :raises UsageError: If a key is unknown or given twice, or a text is not of that form.
    """
    if isinstance(create, Mapping):
        pairs = list(create.items())
    else:
        parts = [part.strip() for part in create.split(",")] if create else []
        if malformed := [part for part in parts if not all(map(str.strip, part.partition("=")))]:
            raise UsageError(f"--create {malformed[0]!r} is not of the form KEY=VALUE,KEY=VALUE, such as shards=4")
        split = [(key.strip(), value.strip()) for key, _, value in (part.partition("=") for part in parts)]
        pairs = [(key, int(value) if key in NUMBERS and value.isdecimal() else value) for key, value in split]
    for key, _ in pairs:
        if key not in CREATE_KEYS:
            raise UsageError(f"there is no creation option {key!r} {did_you_mean(str(key), CREATE_KEYS)}")
    if len(dict(pairs)) < len(pairs):
        raise UsageError(f"--create {create} has a key twice; give each once")
    return dict(pairs)
