"""Data that training, evaluation and indexing read alike: tables, image folders, pairs and the names of MMEB."""

from typing import Literal, TypeAlias

CaptionChoice: TypeAlias = Literal["text", "captions"]
"""Which texts of an image are used: its caption, or each entry of the column ``captions``."""
