"""The three stages of CoCoA: warm-up, bridge, contrastive."""

from cocoa_embed.train.pipeline import StageResult, run
from cocoa_embed.train.recipe import Recipe

__all__ = ["Recipe", "StageResult", "run"]
