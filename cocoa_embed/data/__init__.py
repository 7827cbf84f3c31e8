"""Data that training, evaluation and indexing all read: tables, image folders, pairs and the names of MMEB."""

from typing import Literal, TypeAlias

CaptionChoice: TypeAlias = Literal["text", "captions"]
"""Which texts of an image are used: its text, or each entry of the column ``captions``."""

SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
"""The usual suffixes of the images in the shards of a WebDataset, and so the names of their columns."""
