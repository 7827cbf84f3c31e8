"""Load a SentenceTransformer from a folder or by its name on the hub, with errors that say what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.model.training_record import explain_unfinished

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def load_model(model: str | Path, device: str | None = None) -> SentenceTransformer:
    """Load a SentenceTransformer from a folder, or by its name (``owner/name``) from the Hugging Face hub.

    :param model: A folder; where there is none of that name, a name on the hub.
    :param device: The torch device; None takes the fastest there is.
    :raises CocoaError: If the folder is missing, is no SentenceTransformer, has no weights, or cannot be loaded.
    """
    check_model(model)
    from sentence_transformers import SentenceTransformer

    folder = Path(model).expanduser()
    is_local = folder.exists()
    try:
        return SentenceTransformer(str(folder if is_local else model), device=device, local_files_only=is_local)
    except Exception as error:  # loading runs code of four libraries, each with errors of its own
        raise CocoaError(
            f"{printable(model)} cannot be loaded as a SentenceTransformer ({type(error).__name__}: {one_line(error)})"
        ) from error


def check_model(model: str | Path) -> None:
    """Refuse what cannot be a model, without loading it.

    :raises CocoaError: If it is no folder of a SentenceTransformer and cannot be the name of a model on the hub.
    """
    folder = Path(model).expanduser()
    if unfinished := explain_unfinished(folder):
        raise CocoaError(unfinished)
    if folder.exists():
        check_model_folder(folder)
    elif not is_hub_name(str(model)):
        raise CocoaError(
            f"{printable(model)}: there is no such model folder; name a folder that cocoa-embed export wrote,"
            " or a model on the Hugging Face hub as owner/name"
        )


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that is no SentenceTransformer or holds no weights.

    :raises CocoaError: If it is.
    """
    name = printable(folder)
    if not folder.is_dir():
        raise CocoaError(f"{name} is a file; a model is a folder, as cocoa-embed export writes it")
    if not (folder / "modules.json").is_file():
        raise CocoaError(
            f"{name} is no SentenceTransformer (it has no modules.json); name a folder that cocoa-embed export wrote"
        )
    if not any(True for pattern in WEIGHT_FILES for _ in folder.rglob(pattern)):
        raise CocoaError(
            f"{name} has no weights (no *.safetensors in it); copy them there or run cocoa-embed export again"
        )


def is_hub_name(name: str) -> bool:
    """Tell whether a name can only mean a model on the hub: ``owner/name``, where ``owner`` is no folder here."""
    owner, slash, rest = name.partition("/")
    is_path = name.startswith((".", "~", os.sep)) or "/" in rest or "\\" in name
    return bool(owner and slash and rest) and not is_path and not Path(owner).exists()
