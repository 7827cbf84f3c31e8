"""Shared by the benchmarks: timing, and a description of the machine."""

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


def machine() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cocoa_embed_version": cocoa_embed.__version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "sentence_transformers_version": sentence_transformers.__version__,
    }
