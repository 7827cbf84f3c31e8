"""The sizes of the models that are benchmarked, so that nothing is downloaded.

``models.json`` has the published sizes of Qwen2-VL-2B, Qwen2.5-VL-3B and -7B and Qwen3-VL-2B: 2.21, 3.75, 8.29 and 2.13
billion parameters. Values that change no speed (``rope_theta``) were not checked against the hub. ``small`` is a body
that a CPU can train, with the vocabulary of Qwen2-VL.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

MODELS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def model_config(name: str) -> PreTrainedConfig:
    """Return the config of one of ``MODELS``."""
    return AutoConfig.for_model(**MODELS[name])
