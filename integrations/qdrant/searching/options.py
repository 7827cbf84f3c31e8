"""The options of a search. Imports no client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.qdrant.stores.base import MAX_HITS
from cocoa_embed.integrations.qdrant.stores.checks import check_numbers

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.stores.client_filters import Filter


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of a search; ``Searcher.search`` describes them."""

    limit: int = 10
    offset: int = 0
    score_threshold: float | None = None
    query_filter: Filter = None
    any_orientation: bool = False
    diversity: float | None = None
    group_by: str | None = None
    hnsw_ef: int | None = None
    exact: bool = False
    vectors: int = 1

    def __post_init__(self) -> None:
        check_numbers(self.limit, self.offset, self.score_threshold, self.diversity)
        if not isinstance(self.group_by, str | None):
            raise UsageError(f"group_by is {self.group_by!r}; give one key of the payload")
        if type(self.vectors) is not int or self.vectors < 1:
            raise UsageError(f"vectors is {self.vectors!r}; give a whole number of 1 or more")
        if self.vectors > 1 and self.diversity is not None:
            raise UsageError("vectors and diversity cannot be combined; give one of them")
        if self.hnsw_ef is not None and (self.exact or not 1 <= self.hnsw_ef <= MAX_HITS):
            raise UsageError(f"hnsw_ef is {self.hnsw_ef}; give a number from 1 to {MAX_HITS}, or exact instead")
        if self.diversity is not None and (self.any_orientation or self.group_by is not None):
            raise UsageError("diversity cannot be combined with any_orientation or group_by; give one of them")
