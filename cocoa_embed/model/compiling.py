"""Compile the layers of a model, with shapes that may change."""

from collections.abc import Iterable

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

MOST_VERSIONS = 64
"""The most compiled versions of a layer: with or without gradients and a mask, in training or in evaluation."""

CompileError = TorchDynamoException
"""The error that a layer that cannot be compiled raises when it first runs."""


def layers_to_compile(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the language model, the vision encoder and, if there is one, the pixel decoder."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module) -> list[nn.Module]:
    """Compile the layers of a model, in place, and return them; the compilation runs in the first pass.

    In a vision layer, everything but the attention is compiled: the attention reads lengths from the CPU.
    """
    layers = layers_to_compile(model)
    torch._dynamo.reset()  # otherwise the versions of an earlier stage would count, too
    torch._dynamo.config.cache_size_limit = MOST_VERSIONS
    for layer in layers:
        layer.compile(dynamic=True)
    return layers


def run_uncompiled(layers: Iterable[nn.Module]) -> None:
    """Undo ``compile_layers``: the layers run uncompiled again."""
    for layer in layers:
        layer._compiled_call_impl = None
