"""Compile the layers of a model, with shapes that may change."""

from collections.abc import Iterable

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

MOST_VERSIONS = 64
"""The most versions of a layer: with gradients and without, with a mask and without, in training and in evaluation."""

CompileError = TorchDynamoException
"""What a layer raises, when it first runs, if it cannot be compiled."""


def layers_to_compile(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the language model and of the vision encoder, and of a pixel decoder."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module) -> list[nn.Module]:
    """Compile the layers of a model, in place, and return them; the first pass takes the time.

    What is in a vision layer before and after its attention is compiled, but not that: it reads lengths from the CPU.
    """
    layers = layers_to_compile(model)
    torch._dynamo.reset()  # the versions of an earlier stage count too
    torch._dynamo.config.cache_size_limit = MOST_VERSIONS
    for layer in layers:
        layer.compile(dynamic=True)
    return layers


def run_uncompiled(layers: Iterable[nn.Module]) -> None:
    """Undo ``compile_layers``: the layers run as they are written."""
    for layer in layers:
        layer._compiled_call_impl = None
