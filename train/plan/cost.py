"""What a training step costs in floating-point operations, and the yardstick to hold that against."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cocoa_embed.model.backbone import SUPPORTED, PatchGeometry
from cocoa_embed.train.settings import StageSettings

MULTIPLY_ADD = 2
"""Operations that one weight costs a token."""

MERGER_MATRICES = 2
"""A merger, deep-stack ones too, is a matrix, an activation and a matrix."""

ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True)
class BatchShape:
    """What a batch's cost depends on.

    :param rows: Sequences of the batch.
    :param length: Tokens that each of them is padded to.
    :param tokens: Tokens that are no padding.
    :param image_grids: Raw patches of each image: frames, rows and columns.
    :param hidden_tokens: Positions that the language-model head is applied to.
    :param hidden_patches: Raw patches that the pixel decoder is judged on; without any, it does not run.
    """

    rows: int
    length: int
    tokens: int
    image_grids: tuple[tuple[int, ...], ...] = ()
    hidden_tokens: int = 0
    hidden_patches: int = 0

    @property
    def positions(self) -> int:
        """Tokens, padding among them."""
        return self.rows * self.length

    @property
    def patches(self) -> int:
        """Raw patches of all images."""
        return sum(math.prod(grid) for grid in self.image_grids)


def batch_shape(batch: Mapping[str, Tensor], prefix: str = "") -> BatchShape:
    """Return the shape of a collator's batch, of the keys that begin with ``prefix``; waits for no device.

    ``tokens`` and ``image_grids`` are values, so the batch must be on the CPU, as a collator leaves it.

    :raises ValueError: If it is elsewhere.
    """
    attention_mask = batch[f"{prefix}{ATTENTION_MASK}"]
    if attention_mask.device.type != "cpu":
        raise ValueError(f"the batch is on {attention_mask.device}; take its shape on the CPU, before it is moved")
    grids = batch.get(f"{prefix}image_grid_thw")
    rows, length = attention_mask.shape
    return BatchShape(
        rows=rows,
        length=length,
        tokens=int(attention_mask.sum()),
        image_grids=() if grids is None else tuple(map(tuple, grids.tolist())),
        hidden_tokens=_length(batch, f"{prefix}target_ids"),
        hidden_patches=_length(batch, f"{prefix}target_patches"),
    )


def batch_shapes(batch: Mapping[str, Tensor]) -> list[BatchShape]:
    """Return the shape of every part of a batch: one part, or in the contrastive stage anchor, positive and so on."""
    return [batch_shape(batch, prefix) for prefix in _prefixes(batch)]


def unpadded_shapes(batch: Mapping[str, Tensor]) -> list[BatchShape]:
    """Return the shapes of a batch's rows, those of one length together: what it would be without padding."""
    shapes = []
    for prefix in _prefixes(batch):
        whole = batch_shape(batch, prefix)
        lengths, counts = batch[f"{prefix}{ATTENTION_MASK}"].sum(dim=1).unique(return_counts=True)
        rows = [
            BatchShape(rows=count, length=length, tokens=count * length, hidden_patches=whole.hidden_patches)
            for length, count in zip(lengths.tolist(), counts.tolist(), strict=True)
        ]
        # Images and the head do not depend on the length of a row: any of the shapes may have them.
        rows[0] = replace(rows[0], image_grids=whole.image_grids, hidden_tokens=whole.hidden_tokens)
        shapes += rows
    return shapes


def _prefixes(batch: Mapping[str, Tensor]) -> list[str]:
    return [key.removesuffix(ATTENTION_MASK) for key in batch if key.endswith(ATTENTION_MASK)]


def _length(batch: Mapping[str, Tensor], key: str) -> int:
    return len(batch[key]) if key in batch else 0


@dataclass(frozen=True)
class TextSize:
    """The language model: ``layer_weights`` are those of one layer's matrices; the widths are per token."""

    layers: int
    layer_weights: int
    width: int
    attention_width: int
    intermediate: int
    vocabulary: int
    normalises_queries: bool


@dataclass(frozen=True)
class VisionSize:
    """The vision encoder: ``merger_weights`` are those of all mergers, ``window`` is in visual tokens a side."""

    blocks: int
    full_blocks: int
    block_weights: int
    width: int
    intermediate: int
    patch_weights: int
    merger_weights: int
    mergers: int
    window: int
    has_gate: bool
    has_rms_norm: bool


@dataclass(frozen=True)
class ModelSize:
    """What a model's cost depends on, from ``model_size``."""

    text: TextSize
    vision: VisionSize
    geometry: PatchGeometry


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the stock model of a config with shapes and without weights."""
    with torch.device("meta"):
        return SUPPORTED[config.model_type](config)


def model_size(config: PreTrainedConfig) -> ModelSize:
    """Read a model's size from its stock class, built without weights; takes a second or so, so keep it."""
    model = meta_model(config)
    decoder, visual = model.get_decoder(), model.base_model.visual
    layer, block = decoder.layers[0], visual.blocks[0]
    weights = {name: module.weight.numel() for name, module in visual.named_modules() if isinstance(module, nn.Linear)}
    inputs = [module.in_features for module in layer.modules() if isinstance(module, nn.Linear)]
    is_windowed = config.model_type == "qwen2_5_vl"
    vision = config.vision_config
    geometry = PatchGeometry.from_config(config)
    return ModelSize(
        text=TextSize(
            layers=len(decoder.layers),
            layer_weights=linear_weights(layer),
            width=decoder.config.hidden_size,
            attention_width=layer.self_attn.o_proj.in_features,
            intermediate=max(inputs),
            vocabulary=model.get_output_embeddings().out_features,
            normalises_queries=config.model_type == "qwen3_vl",
        ),
        vision=VisionSize(
            blocks=len(visual.blocks),
            full_blocks=len(vision.fullatt_block_indexes) if is_windowed else len(visual.blocks),
            block_weights=linear_weights(block),
            width=block.attn.proj.in_features,
            intermediate=max(module.in_features for module in block.mlp.modules() if isinstance(module, nn.Linear)),
            patch_weights=visual.patch_embed.proj.weight.numel(),
            merger_weights=sum(count for name, count in weights.items() if not name.startswith("blocks.")),
            mergers=sum(not name.startswith("blocks.") for name in weights) // MERGER_MATRICES,
            window=vision.window_size // geometry.merge_size // geometry.patch_size if is_windowed else 0,
            has_gate=is_windowed,
            has_rms_norm=is_windowed,
        ),
        geometry=geometry,
    )


def linear_weights(module: nn.Module) -> int:
    """Return how many weights a module's matrices have, without biases."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass by part, matrix products alone.

    ``patches`` is the patch embedding, whose input needs no gradient; ``vision`` is the rest of the vision encoder.
    ``heads`` is the language-model head at hidden positions and the pixel decoder.
    """

    patches: int
    vision: int
    text: int
    heads: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.patches + self.vision + self.text + self.heads


def forward_flops(size: ModelSize, shape: BatchShape) -> Flops:
    """Return the operations of a forward pass, padding among them, attention under a dense mask."""
    return Flops(
        patches=MULTIPLY_ADD * size.vision.patch_weights * shape.patches,
        vision=_vision_flops(size, shape),
        text=size.text.layers * _text_layer_flops(size.text, shape),
        heads=_head_flops(size, shape),
    )


def training_flops(
    size: ModelSize,
    shape: BatchShape,
    *,
    adapter: bool = False,
    vision_adapter: bool = False,
    freeze_vision: bool = False,
) -> int:
    """Return the operations of a step: forward, gradients of activations, and of weights where those are trained.

    What is run again to save memory (checkpoints, the gradient cache's first pass) is not counted, as is usual for the
    share of a device's speed that is put to use; neither are adapters' own matrices, nor what the parts for images do
    for nothing in a batch without any.

    :param adapter: The language model's weights are frozen beside adapters.
    :param vision_adapter: The vision encoder's too.
    :param freeze_vision: The vision encoder gets no gradient at all; so without ``vision_adapter`` beside ``adapter``.
    """
    forward = forward_flops(size, shape)
    if freeze_vision or (adapter and not vision_adapter):
        vision = forward.patches + forward.vision
    elif adapter:
        vision = forward.patches + _frozen(forward.vision, _vision_attention_flops(size, shape))
    else:
        vision = 2 * forward.patches + 3 * forward.vision
    if not adapter:
        return vision + 3 * (forward.text + forward.heads)
    attention = size.text.layers * _attention_flops(size.text, shape)
    head = MULTIPLY_ADD * shape.hidden_tokens * size.text.width * size.text.vocabulary
    return vision + _frozen(forward.text, attention) + 2 * head + 3 * (forward.heads - head)


def _frozen(flops: int, attention: int) -> int:
    """Matrices without gradients of weights cost twice their forward pass; attention has no weights to freeze."""
    return 2 * (flops - attention) + 3 * attention


def _attention_flops(text: TextSize, shape: BatchShape) -> int:
    return 2 * MULTIPLY_ADD * shape.positions * shape.length * text.attention_width


def _text_layer_flops(text: TextSize, shape: BatchShape) -> int:
    return MULTIPLY_ADD * shape.positions * text.layer_weights + _attention_flops(text, shape)


def _head_flops(size: ModelSize, shape: BatchShape) -> int:
    head = MULTIPLY_ADD * shape.hidden_tokens * size.text.width * size.text.vocabulary
    if not shape.hidden_patches:
        return head
    projection = MULTIPLY_ADD * shape.patches * size.text.width * size.geometry.patch_width
    return head + _text_layer_flops(size.text, shape) + projection


def _vision_flops(size: ModelSize, shape: BatchShape) -> int:
    vision = size.vision
    mergers = MULTIPLY_ADD * vision.merger_weights * (shape.patches // size.geometry.patches_per_token)
    matrices = MULTIPLY_ADD * vision.block_weights * shape.patches * vision.blocks
    return matrices + mergers + _vision_attention_flops(size, shape)


def _vision_attention_flops(size: ModelSize, shape: BatchShape) -> int:
    vision, merge = size.vision, size.geometry.merge_size
    full = sum(frames * (height * width) ** 2 for frames, height, width in shape.image_grids)
    windowed = sum(
        frames * _squares(height // merge, vision.window) * _squares(width // merge, vision.window) * merge**4
        for frames, height, width in shape.image_grids
        if vision.window
    )
    pairs = vision.full_blocks * full + (vision.blocks - vision.full_blocks) * windowed
    return 2 * MULTIPLY_ADD * pairs * vision.width


def _squares(length: int, window: int) -> int:
    """Return the sum of the squared lengths of windows, the last of which may be shorter."""
    return length // window * window**2 + (length % window) ** 2


def measure_matmul_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16, *, repeats: int = 5) -> float:
    """Return the operations a second of a large matrix product on a device, timed now: the median of a few."""
    side = 1024 if device.type == "cpu" else 8192
    own = torch.Generator(device).manual_seed(0)  # the run's random numbers do not depend on the measurement
    left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=own) for _ in range(2))
    seconds = []
    for _ in range(repeats + 2):
        _synchronise(device)
        started = time.perf_counter()
        left @ right
        _synchronise(device)
        seconds.append(time.perf_counter() - started)
    return MULTIPLY_ADD * side**3 / statistics.median(seconds[2:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total_training_flops(size: ModelSize, shapes: Sequence[BatchShape], **what_is_trained: bool) -> int:
    """Return ``training_flops`` of several parts together."""
    return sum(training_flops(size, shape, **what_is_trained) for shape in shapes)


@dataclass(frozen=True)
class StepCost:
    """What a batch of a stage takes to train on; a worker may call it."""

    size: ModelSize
    adapter: bool
    vision_adapter: bool
    freeze_vision: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, settings: StageSettings) -> "StepCost":
        """Read a backbone's size from its config, and what is trained of it from a stage's settings."""
        return cls(
            model_size(config),
            adapter=settings.adapter is not None,
            vision_adapter=settings.adapts_vision,
            freeze_vision=settings.freeze_vision,
        )

    def __call__(self, batch: Mapping[str, Tensor]) -> float:
        """Return the operations that forward and backward pass need: padding is none of them."""
        return float(sum(self.of_shape(shape) for shape in unpadded_shapes(batch)))

    def of_shape(self, shape: BatchShape) -> int:
        """Return the operations of forward and backward pass for a batch of a shape."""
        return training_flops(
            self.size,
            shape,
            adapter=self.adapter,
            vision_adapter=self.vision_adapter,
            freeze_vision=self.freeze_vision,
        )
