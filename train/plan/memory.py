"""What a training step keeps in memory: an estimate, to choose a batch by before a run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cocoa_embed.train.loop.adapters import freeze_vision, target_names
from cocoa_embed.train.plan.cost import BatchShape, ModelSize, meta_model
from cocoa_embed.train.settings import StageSettings

FULL, HALF = 4, 2
"""Bytes of float32, and of bfloat16."""

ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, shared ones once, and how many of them are trained."""

    total: int
    trainable: int


def count_parameters(model: nn.Module) -> Parameters:
    """Count a model's parameters as they stand."""
    every = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in every if parameter.requires_grad)
    return Parameters(total=sum(parameter.numel() for parameter in every), trainable=trainable)


def stage_parameters(
    config: PreTrainedConfig,
    settings: StageSettings,
    extra_module: Callable[[PreTrainedModel], nn.Module | None] = lambda model: None,
) -> Parameters:
    """Count the parameters that a stage runs and trains, from the backbone's config alone.

    An adapter has ``r`` rows and columns for each matrix that it stands beside, and in DoRA a magnitude for each of its
    outputs; it counts in both numbers.

    :param extra_module: Returns what is trained beside the backbone, whole even beside adapters.
    """
    model = meta_model(config)
    with torch.device("meta"):
        beside = extra_module(model)
    extra = 0 if beside is None else count_parameters(beside).total
    if settings.freeze_vision:
        freeze_vision(model)
    adapter, counted = settings.adapter, count_parameters(model)
    if adapter is None:
        return Parameters(total=counted.total + extra, trainable=counted.trainable + extra)
    adapted = [model.get_submodule(name) for name in target_names(model, vision=settings.adapts_vision)]
    shapes = [matrix.weight.shape for matrix in adapted]
    has_magnitudes = adapter.kind == "dora"
    added = sum(adapter.r * (width + height) + has_magnitudes * height for height, width in shapes)
    return Parameters(total=counted.total + added + extra, trainable=added + extra)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.casts + self.activations + self.logits


def training_memory(
    counts: Parameters,
    size: ModelSize,
    shape: BatchShape,
    *,
    world_size: int = 1,
    autocast: bool = True,
    gradient_checkpointing: bool = False,
    freeze_vision: bool = False,
    dense_mask: bool = True,
) -> Memory:
    """Estimate a device's memory at the end of a forward pass, with float32 weights and Adam.

    Left out: what a kernel needs while it runs, the allocator's fragments, the framework's
    own, the gathered weights of the layer that FSDP is at, and adapters' activations. Where weights are frozen the
    activations are as good as those of full training, since gradients pass through them.

    :param counts: From ``stage_parameters``.
    :param size: From ``model_size``.
    :param shape: What a device runs at once: a micro-batch, or a chunk of a gradient-cached batch.
    :param world_size: Devices that weights, gradients and moments are sharded over (FSDP2); 1 without sharding.
    :param autocast: Matrices run in bfloat16, of which autocast keeps copies until the forward pass ends.
    :param gradient_checkpointing: Keep each layer's input alone, and one layer's activations at a time.
    :param freeze_vision: The vision encoder keeps nothing for a backward pass.
    :param dense_mask: Attention keeps the mask of every layer, as sdpa does and FlexAttention does not.
    """
    return Memory(
        weights=FULL * counts.total // world_size,
        gradients=FULL * counts.trainable // world_size,
        optimizer=ADAM_MOMENTS * FULL * counts.trainable // world_size,
        casts=HALF * counts.total if autocast else 0,
        activations=activation_bytes(
            size,
            shape,
            autocast=autocast,
            gradient_checkpointing=gradient_checkpointing,
            freeze_vision=freeze_vision,
            dense_mask=dense_mask,
        ),
        logits=logit_bytes(size, shape, autocast=autocast),
    )


def logit_bytes(size: ModelSize, shape: BatchShape, *, autocast: bool = True) -> int:
    """Return the bytes of the logits at hidden positions: themselves, their float32 log-softmax, and its gradient."""
    return shape.hidden_tokens * size.text.vocabulary * ((HALF if autocast else FULL) + 2 * FULL)


def activation_bytes(
    size: ModelSize,
    shape: BatchShape,
    *,
    autocast: bool = True,
    gradient_checkpointing: bool = False,
    freeze_vision: bool = False,
    dense_mask: bool = True,
) -> int:
    """Return the bytes that the backward pass needs of the forward pass, without the logits."""
    text_layer = _text_layer_bytes(size, shape, autocast=autocast, dense_mask=dense_mask)
    text_input = FULL * shape.positions * size.text.width
    vision_block, vision_input = (0, 0) if freeze_vision else _vision_block_bytes(size, shape, autocast=autocast)
    rest = 2 * text_input + _pixel_bytes(size, shape, autocast=autocast, freeze_vision=freeze_vision)
    if shape.hidden_patches:
        rest += text_layer  # the pixel decoder's, which is not checkpointed
    if not freeze_vision:
        rest += _merger_bytes(size, shape, autocast=autocast)
    if not gradient_checkpointing:
        return rest + size.text.layers * text_layer + size.vision.blocks * vision_block
    return rest + size.text.layers * text_input + size.vision.blocks * vision_input + max(text_layer, vision_block)


def _pixel_bytes(size: ModelSize, shape: BatchShape, *, autocast: bool, freeze_vision: bool) -> int:
    """Return the bytes of the patches that the encoder reads and, hidden, of their predictions and targets."""
    read = 0 if freeze_vision else shape.patches * (HALF if autocast else FULL)
    predicted = shape.patches * (HALF if autocast else FULL) if shape.hidden_patches and autocast else 0
    return (read + predicted + 2 * FULL * shape.hidden_patches) * size.geometry.patch_width


def _text_layer_bytes(size: ModelSize, shape: BatchShape, *, autocast: bool, dense_mask: bool) -> int:
    text, matrix = size.text, HALF if autocast else FULL
    # Each RMSNorm keeps its input, normalised in float32; autocast then casts once for each matrix (q, k, v, gate, up).
    norms = 2 * 2 * FULL * text.width + (5 * HALF if autocast else 2 * FULL) * text.width
    # Queries, keys and values (repeated for each head under a mask), and the attention's output.
    attention = 4 * matrix * text.attention_width
    if text.normalises_queries:
        attention += 2 * 2 * FULL * text.attention_width
    # The gate before and after its activation, what it is multiplied with, and the product.
    mlp = 4 * matrix * text.intermediate
    mask = matrix * shape.positions * shape.length if dense_mask else 0
    return shape.positions * (norms + attention + mlp) + mask


def _vision_block_bytes(size: ModelSize, shape: BatchShape, *, autocast: bool) -> tuple[int, int]:
    """Return the bytes that a block keeps, and those of its input."""
    vision, matrix = size.vision, HALF if autocast else FULL
    norms = 2 * ((2 if vision.has_rms_norm else 1) * FULL + matrix) * vision.width
    # qkv in one piece, of which the values are used, the turned queries and keys, the output of images and of all.
    attention = (3 + 2 + 2) * matrix * vision.width
    mlp = (4 if vision.has_gate else 3) * matrix * vision.intermediate
    return shape.patches * (norms + attention + mlp), shape.patches * matrix * vision.width


def _merger_bytes(size: ModelSize, shape: BatchShape, *, autocast: bool) -> int:
    """Each merger keeps its input, that normalised, and its hidden values before and after the activation."""
    vision, matrix = size.vision, HALF if autocast else FULL
    return shape.patches * vision.width * (FULL + 3 * matrix) * vision.mergers
