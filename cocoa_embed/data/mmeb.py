"""MMEB: the 36 subsets of MMEB-V1, the 20 of MMEB-train, the published scores, and what its texts consist of.

Names are those of ``TIGER-Lab/MMEB-eval`` (VLM2Vec, arXiv 2410.05160); the scores are from CoCoA (arXiv 2603.01471).
"""

import re
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from cocoa_embed.data.rows import shortened
from cocoa_embed.errors import RowError

ROWS_OF_A_SUBSET = 1000
"""The queries of each subset of the public data."""

META_TASKS = ("classification", "VQA", "retrieval", "grounding")
IN_DOMAIN, OUT_OF_DOMAIN, OVERALL = "IND", "OOD", "overall"
AVERAGES = (*META_TASKS, IN_DOMAIN, OUT_OF_DOMAIN, OVERALL)
"""The averages over subsets, in the order of the published tables."""


class Subset(NamedTuple):
    """A subset of MMEB-V1; ``in_domain`` if MMEB-train has rows of the same data set."""

    name: str
    meta_task: str
    in_domain: bool

    @property
    def averages(self) -> tuple[str, ...]:
        """The ``AVERAGES`` that include the subset."""
        return (self.meta_task, IN_DOMAIN if self.in_domain else OUT_OF_DOMAIN, OVERALL)


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
"""All subsets of MMEB-V1 by name, in the order of the published tables."""

TRAIN_SUBSETS = tuple(name.replace("ImageNet-1K", "ImageNet_1K") for name in SUBSETS if SUBSETS[name].in_domain)
"""The 20 in-domain subsets, by their names in ``TIGER-Lab/MMEB-train``."""

PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "GME (Qwen2-VL-2B)": (56.9, 41.2, 67.8, 53.4, None, None, 55.8),
    "VLM2Vec (Qwen2-VL-2B)": (59.0, 49.4, 65.4, 73.4, 66.0, 52.6, 59.3),
    "UNITE (Qwen2-VL-2B)": (63.2, 55.9, 65.4, 75.6, 65.8, 60.1, 63.3),
    "MoCa (Qwen2.5-VL-3B)": (59.8, 62.9, 70.6, 88.6, 72.3, 61.5, 67.5),
    "MoCa (Qwen2.5-VL-7B)": (65.8, 64.7, 75.0, 92.4, 74.7, 67.6, 71.5),
    "CoCoA (Qwen2-VL-2B)": (63.0, 57.4, 69.6, 85.8, 70.2, 60.7, 66.0),
    "CoCoA (Qwen2.5-VL-3B)": (60.9, 63.5, 69.5, 88.2, 72.6, 61.2, 67.5),
    "CoCoA (Qwen2.5-VL-7B)": (64.7, 66.5, 72.5, 90.1, 75.7, 64.3, 70.6),
}
"""The published scores of models: precision@1 in per cent, in the order of ``AVERAGES``; None if not published."""


def default_train_subsets(mmeb: str) -> tuple[str, ...]:
    """Return the default subsets of an ``mmeb`` source: all, or none for a folder that is itself a subset."""
    return () if any(Path(mmeb).glob("*.parquet")) else TRAIN_SUBSETS


IMAGE_TOKEN = re.compile(r"\s*<\|image_1\|>\s*")
"""The place of the image in a text; our template puts images first, so it is removed with the space around it."""

IMAGELESS_QUERY = re.compile(r"\s*<\|image_1\|>\s*Find a (Wikipedia image that answers|news image that matches)")
"""How WebQA's and EDIS's queries begin: they have the image token, but no image."""


def without_image_token(text: str, has_image: bool, source: str) -> str:
    """Return a text without the image token, and without the space at its ends.

    :raises RowError: If the text has the token but no image, unless it is a query that is published like this.
    """
    if not has_image and IMAGE_TOKEN.search(text) and not IMAGELESS_QUERY.match(text):
        raise RowError(source, f"{shortened(text)} holds <|image_1|>, but the row has no image path")
    return IMAGE_TOKEN.sub(" ", text).strip()


_QUERIES = {
    "ImageNet-1K": ("Represent the given image for classification",),
    "N24News": ("Represent the given news image with the following caption for domain classification: {}",),
    "HatefulMemes": (
        "Represent the given image for binary classification to determine whether it constitutes hateful speech or not",
    ),
    "VOC2007": ("Identify the object shown in the image",),
    "SUN397": ("Identify the scene shown in the image",),
    **dict.fromkeys(_NAMES["VQA", True].split(), ("Represent the given image with the following question: {}",)),
    "VisDial": ("Represent the given dialogue about an image, which is used for image retrieval: {}",),
    "CIRR": ("Given an image, find a similar everyday image with the described changes: {}",),
    "VisualNews_t2i": ("Retrieve an image of this news caption. {}",),
    "VisualNews_i2t": ("Find a caption for the news in the given photo.",),
    "MSCOCO_t2i": ("Find me an everyday image that matches the given caption: {}",),
    "MSCOCO_i2t": ("Find an image caption describing the given everyday image.",),
    "NIGHTS": ("Find a day-to-day image that looks similar to the provided image.",),
    "WebQA": ("Find a Wikipedia image that answers this question: {}",),
    "MSCOCO": (
        "Select the portion of the image that isolates the object labeled as {}",
        "Crop the image to to isolate the object labeled as {}",
    ),
}
"""The instructions of MMEB-train's queries, and of MMEB-V1's where they differ; ``{}`` is the content."""

_TARGETS = {
    **dict.fromkeys(("CIRR", "VisualNews_t2i", "MSCOCO_t2i", "NIGHTS", "VisDial"), ("Represent the given image.",)),
    "WebQA": ("Represent the given Wikipedia image with related text information: {}",),
    "MSCOCO": ("Represent the given cropped image of the object",),
}
"""The instructions of the other side; the targets of other subsets are content alone."""


def split_instruction(subset: str, side: Literal["query", "target"], text: str) -> tuple[str | None, str | None]:
    """Split a text of one of MMEB-train's subsets into its instruction and its content; joined, they are the text.

    :param subset: Its name in MMEB-train or in MMEB-V1.
    :param side: ``target`` for positives, negatives and candidates.
    :param text: The text without the image token.
    :returns: The instruction with the space that follows it, and the content; None for an empty part. A text that does
        not begin with an instruction of its subset and side is all content.
    """
    for pattern in _patterns(subset.replace("_1K", "-1K"), side):
        if found := pattern.fullmatch(text):
            instruction, content = found.groups()
            return instruction, content or None
    return None, text or None


@cache
def _patterns(subset: str, side: str) -> list[re.Pattern[str]]:
    """Return what the texts of a subset look like, whether or not punctuation ends the instruction."""
    known = (_QUERIES if side == "query" else _TARGETS).get(subset, ())
    heads = [(template.removesuffix("{}").rstrip(" .:"), "{}" in template) for template in known]
    return [re.compile(rf"({re.escape(head)}(?!\w)[.:]?\s*)({'.*' * takes})", re.DOTALL) for head, takes in heads]
