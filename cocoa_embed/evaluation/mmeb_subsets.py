"""MMEB-V1 as data: its 36 subsets, what each belongs to, and the scores that were published for it.

Names are those of ``TIGER-Lab/MMEB-eval`` (VLM2Vec, arXiv 2410.05160); the scores are from CoCoA (arXiv 2603.01471).
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from cocoa_embed.errors import UsageError

ROWS_OF_A_SUBSET = 1000
"""The queries of each subset of the public data."""

META_TASKS = ("classification", "VQA", "retrieval", "grounding")
IN_DOMAIN, OUT_OF_DOMAIN, OVERALL = "IND", "OOD", "overall"
AVERAGES = (*META_TASKS, IN_DOMAIN, OUT_OF_DOMAIN, OVERALL)
"""What subsets are averaged over, as the tables have it."""


@dataclass(frozen=True)
class Subset:
    """One of the 36; ``in_domain`` if MMEB-train has rows of the same data set."""

    name: str
    meta_task: str
    in_domain: bool

    @property
    def averages(self) -> tuple[str, ...]:
        """Those of ``AVERAGES`` that the subset counts in."""
        return (self.meta_task, IN_DOMAIN if self.in_domain else OUT_OF_DOMAIN, OVERALL)


@dataclass(frozen=True)
class PublishedScores:
    """What was published for a model: precision@1 in per cent, in the order of ``AVERAGES``; None: not told."""

    model: str
    scores: tuple[float | None, ...]


_NAMES = {
    ("classification", True): "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
    ("classification", False): "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ("VQA", True): "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
    ("VQA", False): "ScienceQA VizWiz GQA TextVQA",
    ("retrieval", True): "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
    ("retrieval", False): "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ("grounding", True): "MSCOCO",
    ("grounding", False): "RefCOCO RefCOCO-Matching Visual7W-Pointing",
}

SUBSETS = {
    name: Subset(name, meta_task, in_domain)
    for (meta_task, in_domain), names in _NAMES.items()
    for name in names.split()
}
"""All subsets by name, in the order of the tables."""

PUBLISHED = (
    PublishedScores("GME (Qwen2-VL-2B)", (56.9, 41.2, 67.8, 53.4, None, None, 55.8)),
    PublishedScores("VLM2Vec (Qwen2-VL-2B)", (59.0, 49.4, 65.4, 73.4, 66.0, 52.6, 59.3)),
    PublishedScores("UNITE (Qwen2-VL-2B)", (63.2, 55.9, 65.4, 75.6, 65.8, 60.1, 63.3)),
    PublishedScores("MoCa (Qwen2.5-VL-3B)", (59.8, 62.9, 70.6, 88.6, 72.3, 61.5, 67.5)),
    PublishedScores("MoCa (Qwen2.5-VL-7B)", (65.8, 64.7, 75.0, 92.4, 74.7, 67.6, 71.5)),
    PublishedScores("CoCoA (Qwen2-VL-2B)", (63.0, 57.4, 69.6, 85.8, 70.2, 60.7, 66.0)),
    PublishedScores("CoCoA (Qwen2.5-VL-3B)", (60.9, 63.5, 69.5, 88.2, 72.6, 61.2, 67.5)),
    PublishedScores("CoCoA (Qwen2.5-VL-7B)", (64.7, 66.5, 72.5, 90.1, 75.7, 64.3, 70.6)),
)


def require_subset(name: str) -> Subset:
    """Return the subset of that name.

    :raises UsageError: If there is none; the message names the nearest.
    """
    if name not in SUBSETS:
        raise UsageError(f"MMEB-V1 has no subset {name!r}{nearest(name, tuple(SUBSETS))}")
    return SUBSETS[name]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a sentence that says which of the names that are known may have been meant."""
    by_lower_case = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    listed = f"known are {', '.join(known) or 'none'}"
    return f"; did you mean {by_lower_case[found[0]]!r}? ({listed})" if found else f" ({listed})"
