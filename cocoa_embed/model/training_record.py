"""What a checkpoint or an export tells of its own training."""

import json
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, one_line

TRAINING_FILE = "cocoa_training.json"
"""In every checkpoint and export: the recipe, the stages run, the results measured. What makes a folder ours."""


def read_training(checkpoint: Path, *, needs_weights: bool = True) -> dict[str, Any]:
    """Read what is known of a checkpoint's training.

    :param needs_weights: The weights are to be there too; without, they may have been removed to save disk.
    :raises CocoaError: If the folder is no checkpoint of this project.
    """
    path = checkpoint / TRAINING_FILE
    remedy = "Give the folder of a stage that `cocoa-embed train` has written."
    keys = {"backbone", "origin", "recipe", "stages"}
    if not path.is_file() or (needs_weights and not list(checkpoint.glob("*.safetensors"))):
        raise CocoaError(f"{checkpoint} is no checkpoint: it needs {TRAINING_FILE} and *.safetensors. {remedy}")
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CocoaError(f"{path} is not JSON ({one_line(error)}): the checkpoint is incomplete. {remedy}") from error
    if not isinstance(training, dict) or not keys <= training.keys():
        raise CocoaError(f"{path} lacks one of {', '.join(sorted(keys))}: the checkpoint is incomplete. {remedy}")
    return training


def is_bidirectional(training: dict[str, Any]) -> bool:
    """Tell from a checkpoint's record (``read_training``) whether it was made bidirectional."""
    # Recipes written before there was a choice say nothing of it.
    return bool(training["recipe"].get("bidirectional", True))
