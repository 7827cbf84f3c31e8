"""Count the floating-point operations (FLOPs) of a training step from a model's config and a batch's shape."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cocoa_embed.model.families.family import PatchGeometry
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.train.settings import StageSettings

MULTIPLY_ADD = 2
"""FLOPs of one weight for one token."""

ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True)
class BatchShape:
    """The properties of a batch that determine its cost.

    :param lengths: Tokens of each sequence, usually without padding; to include its cost, give padded lengths.
    :param image_grids: Raw patches of each image: frames, rows, columns.
    :param masked_tokens: Positions that the language-model head is applied to.
    :param masked_patches: Raw patches that the pixel decoder is trained on; without any, it does not run.
    """

    lengths: tuple[int, ...]
    image_grids: tuple[tuple[int, ...], ...] = ()
    masked_tokens: int = 0
    masked_patches: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @property
    def token_pairs(self) -> int:
        """Pairs of tokens in the same sequence."""
        return sum(length**2 for length in self.lengths)

    @property
    def patches(self) -> int:
        """Raw patches of all images."""
        return sum(math.prod(grid) for grid in self.image_grids)


def batch_shape(batch: Mapping[str, Tensor], prefix: str = "") -> BatchShape:
    """Return the shape, without padding, of the part of a collator's batch whose keys start with ``prefix``."""
    grids = batch.get(f"{prefix}image_grid_thw")
    return BatchShape(
        lengths=tuple(batch[f"{prefix}{ATTENTION_MASK}"].sum(dim=1).tolist()),
        image_grids=() if grids is None else tuple(map(tuple, grids.tolist())),
        masked_tokens=len(batch.get(f"{prefix}target_ids", ())),
        masked_patches=len(batch.get(f"{prefix}target_patches", ())),
    )


@dataclass(frozen=True)
class LayerSize:
    """A stack of equal transformer layers.

    :param weights: The number of weights in the linear modules of one layer.
    :param attention_width: The number of heads times the width of a head.
    """

    layers: int
    weights: int
    width: int
    attention_width: int

    @classmethod
    def of(cls, stack: nn.Module, *, attention_output: str) -> "LayerSize":
        """Measure the first layer of a stack; ``attention_output`` is the name of its attention's last matrix."""
        linears = _linears(stack.get_submodule("0"))
        output = linears[attention_output]
        return cls(len(list(stack.children())), _weights(linears), output.out_features, output.in_features)


@dataclass(frozen=True)
class ModelSize:
    """The properties of a model that determine its cost.

    :param merger_weights: The weights of all mergers, those of DeepStack (Qwen3-VL) included.
    :param patches_per_row: How many patches of the vision encoder are in a row of ``pixel_values``.
    :param full_layers: The number of vision layers that attend to the whole image; the others attend inside windows
        with a side of ``window`` raw patches.
    """

    text: LayerSize
    vision: LayerSize
    vocabulary: int
    patch_weights: int
    merger_weights: int
    full_layers: int
    window: int
    geometry: PatchGeometry
    patches_per_row: int = 1


def model_size(config: PreTrainedConfig) -> ModelSize:
    """Measure the stock model of a config; this takes about a second."""
    family = family_of(config)
    names, geometry, window = family.parts, family.geometry, family.attention_window
    with torch.device("meta"):
        model = family.model_class(config)
    in_layers = set(family.vision_layers(model).modules())
    mergers = {name: each for name, each in _linears(family.vision(model)).items() if each not in in_layers}
    layers = LayerSize.of(family.vision_layers(model), attention_output=names.attention_output)
    return ModelSize(
        text=LayerSize.of(model.get_decoder().get_submodule("layers"), attention_output="self_attn.o_proj"),
        vision=layers,
        vocabulary=config.get_text_config().vocab_size,
        patch_weights=family.encoder(model).get_parameter(names.patches).numel(),
        merger_weights=_weights(mergers),
        full_layers=family.layers().get("full", layers.layers),
        window=window or geometry.merge_size,
        geometry=geometry,
        patches_per_row=family.patches_per_row,
    )


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def _weights(linears: Mapping[str, nn.Linear]) -> int:
    return sum(linear.weight.numel() for linear in linears.values())


class Flops(NamedTuple):
    """FLOPs of the matrix products of a forward pass, by part."""

    patch_embedding: int
    vision: int
    vision_attention: int
    text: int
    text_attention: int
    head: int
    pixel_decoder: int


def forward_flops(size: ModelSize, shape: BatchShape) -> Flops:
    """Return the FLOPs of a forward pass with attention under a dense mask."""
    text, vision, geometry = size.text, size.vision, size.geometry
    patches = size.patches_per_row * shape.patches
    merger = size.merger_weights * (shape.patches // geometry.patches_per_token)
    layer, layer_attention = text.weights * shape.tokens, 2 * text.attention_width * shape.token_pairs
    projection = text.width * geometry.patch_width * shape.patches
    counts = Flops(
        patch_embedding=size.patch_weights * patches,
        vision=vision.layers * vision.weights * patches + merger,
        vision_attention=2 * vision.attention_width * _patch_pairs(size, shape) * size.patches_per_row**2,
        text=text.layers * layer,
        text_attention=text.layers * layer_attention,
        head=text.width * size.vocabulary * shape.masked_tokens,
        pixel_decoder=layer + layer_attention + projection if shape.masked_patches else 0,
    )
    return Flops(*(MULTIPLY_ADD * count for count in counts))


def _patch_pairs(size: ModelSize, shape: BatchShape) -> int:
    """Return the pairs of raw patches that attend to each other, over all vision layers."""

    def in_windows(side: int) -> int:  # the last window may be smaller
        return side // size.window * size.window**2 + (side % size.window) ** 2

    return sum(
        frames * size.full_layers * (rows * columns) ** 2
        + frames * (size.vision.layers - size.full_layers) * in_windows(rows) * in_windows(columns)
        for frames, rows, columns in shape.image_grids
    )


@dataclass(frozen=True)
class StepCost:
    """FLOPs of training on a batch: the forward pass, and the gradients of activations and of trained weights.

    As usual for model FLOPs utilisation, recomputation (gradient checkpointing, the gradient cache's first pass) is not
    counted; nor are an adapter's own matrices.

    :param adapter: An adapter is trained, and the weights are frozen.
    :param freeze_vision: The vision encoder gets no gradient.
    """

    size: ModelSize
    adapter: bool = False
    freeze_vision: bool = False

    @classmethod
    def of(cls, config: PreTrainedConfig, settings: StageSettings) -> "StepCost":
        """Derive the cost from a backbone's config and a stage's settings."""
        return cls(model_size(config), settings.adapter is not None, settings.freeze_vision)

    def __call__(self, batch: Mapping[str, Tensor]) -> float:
        """Return the FLOPs of a collator's batch without padding."""
        prefixes = [key.removesuffix(ATTENTION_MASK) for key in batch if key.endswith(ATTENTION_MASK)]
        return float(sum(self.of_shape(batch_shape(batch, prefix)) for prefix in prefixes))

    def of_shape(self, shape: BatchShape) -> int:
        """Return the FLOPs of a batch of this shape."""
        forward = forward_flops(self.size, shape)
        passes = 2 if self.adapter else 3  # attention has no weights to freeze; the pixel decoder is always trained
        if self.freeze_vision:
            vision = forward.patch_embedding + forward.vision + forward.vision_attention
        else:
            # The patch embedding's input needs no gradient.
            vision = (passes - 1) * forward.patch_embedding + passes * forward.vision + 3 * forward.vision_attention
        text = passes * (forward.text + forward.head) + 3 * (forward.text_attention + forward.pixel_decoder)
        return vision + text


@cache
def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product on a device: the median of five, measured once per process."""
    side = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # has no effect on the run's random numbers
    left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    seconds = []
    for _ in range(7):  # the first two warm up
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return MULTIPLY_ADD * side**3 / statistics.median(seconds[2:])
