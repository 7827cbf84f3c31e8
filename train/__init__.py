"""Train the stages of a recipe in order. Neither importing this package nor reading a recipe imports torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cocoa_embed.cpu_threads import limit_spinning
from cocoa_embed.errors import require

if TYPE_CHECKING:
    from cocoa_embed.train.loop.run_record import StageResult
    from cocoa_embed.train.pipeline import run
    from cocoa_embed.train.recipe import Recipe

__all__ = ["Recipe", "StageResult", "run"]

limit_spinning()

_MODULES = {"Recipe": "recipe", "StageResult": "loop.run_record", "run": "pipeline"}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for needed in ("yaml",) if name == "Recipe" else ("accelerate", "datasets"):
        require(needed, "train")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
