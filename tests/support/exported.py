"""Checkpoints as the pipeline writes them, for tests of what is made from one."""

import json
from pathlib import Path
from typing import Any

from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.train.recipe import Recipe

PROMPTS = {"query": "large red circle: ", "document": "on white: "}
"""Words that the tiny tokenizer knows; both are set, so that neither is taken for the other or for nothing."""

TRAINING: dict[str, Any] = {
    "backbone": "a-tiny-backbone",
    "origin": "folder",
    "recipe": Recipe.parse(
        {
            "name": "tiny-test",
            "backbone": "a-tiny-backbone",
            "seed": 17,
            "prompts": PROMPTS,
            "warmup": {"steps": 11, "batch_size": 4, "learning_rate": 3e-4},
            "contrastive": {"steps": 13, "batch_size": 8, "learning_rate": 5e-4},
        }
    ).model_dump(mode="json"),
    "stages": [
        {"stage": stage, "steps": steps, "batch_size": size, "learning_rate": rate, "adapter": None, "final": final}
        for stage, steps, size, rate, final in (
            ("warmup", 11, 4, 3e-4, {"loss": 1.234}),
            ("contrastive", 13, 8, 5e-4, {"loss": 0.567}),
        )
    ],
    "data": "24 rows of scenes",
}


def write_checkpoint(backbone: Backbone, folder: Path) -> Path:
    """Write a backbone as the checkpoint of a last stage."""
    backbone.save(folder)
    (folder / TRAINING_FILE).write_text(json.dumps(TRAINING), encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below ``folder`` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
