"""What an indexing run did, counted by files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.image_metadata import ImageFiles


@dataclass(frozen=True)
class IndexSummary:
    """The result of an indexing run. Every file counts once: indexed, unchanged, updated, replaced or failed."""

    collection: str
    indexed: int
    """Files with new content."""
    unchanged: int
    """Files with the same content as before, or the same as another new file of this run."""
    updated: int
    """Files whose content was stored already, with a new path, caption or metadata."""
    replaced: int
    """Files with other content than before; the old point is deleted unless another file has its content."""
    pruned: int
    """Files that no longer exist and were removed from the index."""
    failed: list[dict[str, str]]
    """Files that could not be used, as ``{"path", "reason"}``."""
    seconds: float
    """Without loading the model."""
    images_per_second: float
    """Images embedded and stored per second."""


@dataclass
class Counts:
    """What a run has done so far."""

    indexed: int = 0
    updated: set[str] = field(default_factory=set)
    """Paths, because a file may be updated for more than one reason."""
    replaced: set[str] = field(default_factory=set)
    pruned: int = 0
    embedded: int = 0
    """Contents that the model has embedded."""
    failed: list[dict[str, str]] = field(default_factory=list)

    def summary(self, collection: str, files: ImageFiles, seconds: float) -> IndexSummary:
        """Return the summary of a finished run over ``files``."""
        changed = self.indexed + len(self.updated) + len(self.replaced) + len(self.failed)
        return IndexSummary(
            collection=collection,
            indexed=self.indexed,
            unchanged=len(files) - changed,
            updated=len(self.updated),
            replaced=len(self.replaced),
            pruned=self.pruned,
            failed=sorted([*self.failed, *files.unlisted], key=lambda failure: failure["path"]),
            seconds=seconds,
            images_per_second=self.embedded / seconds,
        )
