"""Compile the layers of a language model, with shapes that may change."""

from collections.abc import Iterable

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

MOST_VERSIONS = 64
"""The most versions of a layer: with gradients and without, with a mask and without, in training and in evaluation."""

CompileError = TorchDynamoException
"""What a layer raises, when it first runs, if it cannot be compiled."""


def compile_layers(model: nn.Module) -> list[nn.Module]:
    """Compile the decoder layers of a model, in place, and return them; the first pass takes the time.

    The vision encoder's layers stay as they are: each of them cuts its input by lengths that it reads from the CPU.
    """
    layers: list[nn.Module] = [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and "visual" not in name.split(".")
    ]
    torch._dynamo.reset()  # the versions of an earlier stage count too
    torch._dynamo.config.cache_size_limit = MOST_VERSIONS
    for layer in layers:
        layer.compile(dynamic=True)
    return layers


def run_uncompiled(layers: Iterable[nn.Module]) -> None:
    """Let layers of ``compile_layers`` run as they are written again."""
    for layer in layers:
        layer._compiled_call_impl = None
