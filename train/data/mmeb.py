"""The layout of MMEB-train: its subsets, its columns and its files."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.train.settings import ColumnsSettings

MMEB_TRAIN_SUBSETS = (
    "ImageNet_1K",
    "N24News",
    "HatefulMemes",
    "VOC2007",
    "SUN397",
    "OK-VQA",
    "A-OKVQA",
    "DocVQA",
    "InfographicsVQA",
    "ChartQA",
    "Visual7W",
    "VisDial",
    "CIRR",
    "VisualNews_t2i",
    "VisualNews_i2t",
    "MSCOCO_t2i",
    "MSCOCO_i2t",
    "NIGHTS",
    "WebQA",
    "MSCOCO",
)
"""The 20 in-domain subsets, as TIGER-Lab/MMEB-train calls them."""

MMEB_COLUMNS = ColumnsSettings(
    query_text="qry",
    query_image="qry_image_path",
    positive_text="pos_text",
    positive_image="pos_image_path",
    negative_text="neg_text",
    negative_image="neg_image_path",
)

OPTIONAL_COLUMNS = ("neg_text", "neg_image_path")

UNSPLIT, ORIGINAL = "train", "original"
"""The split that a recipe has by default, and what MMEB-train calls the one that it means."""


def splits_of(split: str) -> tuple[str, ...]:
    """Return the splits to look for: MMEB-train has none called ``train``, but ``original``."""
    return (UNSPLIT, ORIGINAL) if split == UNSPLIT else (split,)


def default_subsets(mmeb: str) -> tuple[str, ...]:
    """Return the subsets that are meant where none is named: all, or none for a folder that is itself a subset."""
    return () if any(Path(mmeb).glob("*.parquet")) else MMEB_TRAIN_SUBSETS


def columns_found(found: Sequence[str]) -> ColumnsSettings:
    """Return the layout's columns, those of negatives only where they are found."""
    given = MMEB_COLUMNS.model_dump()
    return ColumnsSettings(
        **{part: name for part, name in given.items() if name in found or name not in OPTIONAL_COLUMNS}
    )


def find_subset_files(folder: Path, subset: str, split: str) -> list[Path]:
    """Return the Parquet files of a subset's split: in the sub-folder of that name, or in a folder that holds files.

    :raises CocoaError: If there is no such sub-folder, or no file of the split in it.
    """
    of_subset = folder / subset
    if not of_subset.is_dir():
        of_subset = folder
    files = sorted(of_subset.glob("*.parquet"))
    if not files:
        names = sorted(entry.name for entry in folder.iterdir() if any(entry.glob("*.parquet")))
        raise CocoaError(f"{printable(of_subset)} holds no subset {subset!r}{nearest_subset(subset, names)}.")
    by_split = {name: [file for file in files if file.stem.split("-")[0] == name] for name in splits_of(split)}
    found = next((of_split for of_split in by_split.values() if of_split), None)
    if found is None:
        splits = ", ".join(sorted({file.stem.split("-")[0] for file in files}))
        raise CocoaError(
            f"{printable(of_subset)} holds no files of the split {split!r}; found are {splits}: give split."
        )
    return found


def nearest_subset(subset: str, known: Sequence[str]) -> str:
    """Return the end of a sentence that says which subset may have been meant."""
    nearest = difflib.get_close_matches(subset, known, n=1, cutoff=0.5)
    listed = f"known are {', '.join(known) or 'none'}"
    return f"; did you mean {nearest[0]!r}? ({listed})" if nearest else f" ({listed})"
