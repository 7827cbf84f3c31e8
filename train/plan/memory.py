"""Estimate the memory of a training step, to choose a batch size before a run."""

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cocoa_embed.train.loop.adapters import prepare_trainable
from cocoa_embed.train.plan.cost import BatchShape, LayerSize, ModelSize, meta_model
from cocoa_embed.train.settings import StageSettings

FULL, HALF = 4, 2
"""Bytes of float32, and of bfloat16."""

ADAM_MOMENTS = 2

TEXT_ATTENTION = 4
"""Tensors that attention keeps: queries, keys and values of every head, and its output."""

VISION_ATTENTION = 7
"""The joint queries, keys and values, the rotated queries and keys, the output of each image and of all images."""


@dataclass(frozen=True)
class Parameters:
    """The number of a model's parameters, tied ones counted once, and of those that are trained."""

    total: int
    trainable: int


def count_parameters(model: nn.Module) -> Parameters:
    """Count a model's parameters."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Parameters(sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained))


def stage_parameters(
    config: PreTrainedConfig, settings: StageSettings, extra_module: Callable[[PreTrainedModel], nn.Module | None]
) -> Parameters:
    """Count the parameters that a stage uses and trains, from the backbone's config alone.

    :param extra_module: Returns a module that is trained beside the backbone, such as the pixel decoder.
    """
    model = meta_model(config)
    with torch.device("meta"):
        extra = extra_module(model)  # before the adapter: it may copy layers
        prepare_trainable(model, settings)
    backbone, beside = count_parameters(model), 0 if extra is None else count_parameters(extra).total
    return Parameters(backbone.total + beside, backbone.trainable + beside)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by use."""

    weights: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(astuple(self))


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

    Not included: kernels' workspaces, the allocator's fragmentation, the CUDA context, the layer that FSDP gathers, and
    adapters' own activations.

    :param counts: From ``stage_parameters``.
    :param size: From ``model_size``.
    :param shape: The batch that a device runs at once, with padded lengths.
    :param world_size: Devices that weights, gradients and moments are sharded over (FSDP2); 1 without sharding.
    :param autocast: Matrices run in bfloat16; autocast keeps copies of the weights until the forward pass ends.
    :param gradient_checkpointing: Each layer keeps its input alone, and one layer at a time its activations.
    :param freeze_vision: The vision encoder keeps no activations.
    :param dense_mask: Attention keeps the mask in every layer: true for sdpa, false for FlexAttention.
    """
    matrix = HALF if autocast else FULL
    patches = 0 if freeze_vision else shape.patches
    mask = matrix * shape.token_pairs if dense_mask else 0
    return Memory(
        weights=FULL * counts.total // world_size,
        gradients=FULL * counts.trainable // world_size,
        optimizer=ADAM_MOMENTS * FULL * counts.trainable // world_size,
        casts=HALF * counts.total if autocast else 0,
        activations=_activation_bytes(size, shape, matrix, patches, mask, checkpointing=gradient_checkpointing),
        # The logits at masked positions, their float32 log-softmax, and its gradient.
        logits=shape.masked_tokens * size.vocabulary * (matrix + 2 * FULL),
    )


def _activation_bytes(
    size: ModelSize, shape: BatchShape, matrix: int, patches: int, mask: int, *, checkpointing: bool
) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, without the logits.

    :param matrix: Bytes of a value in a matrix product.
    :param patches: Raw patches whose activations are kept.
    :param mask: Bytes of the attention mask that each text layer keeps.
    """
    text_input = FULL * size.text.width * shape.tokens
    text_layer = _layer_bytes(size.text, matrix, TEXT_ATTENTION) * shape.tokens + mask
    vision_input = matrix * size.vision.width * patches
    vision_layer = _layer_bytes(size.vision, matrix, VISION_ATTENTION) * patches
    # The embeddings and the last hidden states; a merger's input, normalised, and before and after its activation.
    rest = 2 * text_input + patches * size.vision.width * (FULL + 3 * matrix) * size.mergers
    rest += size.geometry.patch_width * (matrix * patches + 2 * FULL * shape.masked_patches)
    if shape.masked_patches:  # the pixel decoder's layer, which is never checkpointed, and under autocast its output
        rest += text_layer + (size.geometry.patch_width * HALF * shape.patches if matrix == HALF else 0)
    if not checkpointing:
        return rest + size.text.layers * text_layer + size.vision.layers * vision_layer
    inputs = size.text.layers * text_input + size.vision.layers * vision_input
    return rest + inputs + max(text_layer, vision_layer)


def _layer_bytes(size: LayerSize, matrix: int, attention_tensors: int) -> int:
    """Return the bytes that one layer keeps of a token."""
    # Two norms: an RMSNorm keeps its input and that normalised, in float32; a LayerNorm its input.
    norms = 2 * (2 if size.is_gated else 1) * FULL * size.width
    # Their outputs: autocast casts them for each matrix that reads them, all but the last of attention and of the MLP.
    norms += matrix * size.width * (size.linears - 2 if matrix == HALF else 2)
    attention = attention_tensors * matrix * size.attention_width
    if size.normalises_queries:
        attention += 2 * 2 * FULL * size.attention_width
    # Before and after the activation, and with a gate the other factor; the product.
    mlp = (4 if size.is_gated else 3) * matrix * size.intermediate
    return norms + attention + mlp
