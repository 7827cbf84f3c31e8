"""Timing, and a description of the machine."""

import os
import time
from collections.abc import Callable
from typing import Any

import sentence_transformers
import torch
import transformers

import cocoa_embed


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cocoa_embed_version": cocoa_embed.__version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "sentence_transformers_version": sentence_transformers.__version__,
    }
