"""Load a vision-language backbone: weights complete, ids and patch geometry read from its config."""

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.attention import make_bidirectional, make_causal
from cocoa_embed.model.flex_attention import FLEX, use_flex_attention
from cocoa_embed.model.template import CHAT_TEMPLATE
from cocoa_embed.model.training_record import explain_unfinished

MASK_TOKEN = "<|mask|>"
"""Stands for a hidden text token; added to tokenizers that have no mask token, as Qwen's have none."""

MAX_ASPECT_RATIO = 200
"""Images of a greater ratio of their sides are refused by Qwen's image processors."""

SUPPORTED: dict[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
"""Model type to the stock transformers class that runs it."""


Origin = Literal["folder", "built-in", "hub"]
"""Where a backbone is from."""


@dataclass(frozen=True)
class PatchGeometry:
    """How an image becomes rows of ``pixel_values`` and visual tokens, from a vision config."""

    channels: int
    temporal_patch_size: int
    patch_size: int
    merge_size: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "PatchGeometry":
        """Read the geometry from a model's config."""
        vision = config.vision_config
        return cls(
            channels=vision.in_channels,
            temporal_patch_size=vision.temporal_patch_size,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
        )

    @property
    def patch_width(self) -> int:
        """Values in one raw patch, a row of ``pixel_values`` (1176 for Qwen2-VL)."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        """Raw patches behind one visual token (4 for Qwen2-VL)."""
        return self.merge_size**2


@dataclass(frozen=True)
class Backbone:
    """A bidirectional vision-language model and the processor that renders its inputs."""

    model: PreTrainedModel
    processor: ProcessorMixin

    @property
    def geometry(self) -> PatchGeometry:
        """The patch geometry of the model's vision encoder."""
        return PatchGeometry.from_config(self.model.config)

    def save(self, folder: Path) -> None:
        """Write weights, config and processor to ``folder``."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def builtin_backbones() -> list[str]:
    """Return the names of the backbones that ship with the package."""
    return sorted(entry.name for entry in (files("cocoa_embed") / "backbones").iterdir() if entry.is_dir())


def origin(name_or_path: str) -> Origin:
    """Return what ``name_or_path`` means: a folder that is there comes first, then a backbone of this package.

    :raises CocoaError: If it can be none of the three, or is a stage that is not finished.
    """
    if unfinished := explain_unfinished(Path(name_or_path)):
        raise CocoaError(unfinished)
    if Path(name_or_path).is_dir():
        return "folder"
    if name_or_path in builtin_backbones():
        return "built-in"
    if name_or_path.startswith((".", "/", "~")) or "/" not in name_or_path:
        raise CocoaError(
            f"No backbone {name_or_path!r}: it is no folder and none of this package's "
            f"({', '.join(builtin_backbones())}); give a folder, one of those, or a hub name such as "
            "Qwen/Qwen2-VL-2B-Instruct."
        )
    return "hub"


def resolve_backbone(name_or_path: str) -> str:
    """Return what transformers loads for ``name_or_path``: a folder, a backbone of this package, or a hub name."""
    if origin(name_or_path) == "built-in":
        return str(files("cocoa_embed") / "backbones" / name_or_path)
    return name_or_path


def load_backbone(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    max_length: int | None = None,
    max_pixels: int | None = None,
    bidirectional: bool = True,
) -> Backbone:
    """Load a backbone by folder, by the name of one of this package's, or by hub name, and make it bidirectional.

    :param attn_implementation: ``sdpa``, ``eager``, or ``flex_attention`` for the language model under a ``BlockMask``.
    :param max_length: Tokens a sequence may have, stored in the tokenizer; by default what the tokenizer says.
    :param bidirectional: False leaves it causal, to be compared with.
    :raises CocoaError: If the backbone is not there, or weights are missing, unexpected or of another shape.
    :raises UsageError: If its model type is not in ``SUPPORTED``.
    """
    config = read_config(name_or_path)
    location = resolve_backbone(name_or_path)
    try:
        model, info = SUPPORTED[config.model_type].from_pretrained(
            location,
            dtype=dtype,
            attn_implementation="sdpa" if attn_implementation == FLEX else attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (OSError, SafetensorError) as error:
        raise CocoaError(f"Cannot load weights from {name_or_path}: {_first_line(error)}") from error
    _refuse_incomplete_weights(name_or_path, info)
    processor = load_processor(name_or_path, max_length=max_length, max_pixels=max_pixels)
    fit_embeddings(model, processor)
    (make_bidirectional if bidirectional else make_causal)(model)
    if attn_implementation == FLEX:
        use_flex_attention(model)
    return Backbone(model=model, processor=processor)


def read_config(name_or_path: str) -> PreTrainedConfig:
    """Read a backbone's config.

    :raises CocoaError: If it is not there.
    :raises UsageError: If its model type is not in ``SUPPORTED``.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_backbone(name_or_path))
    except (OSError, ValueError) as error:
        raise CocoaError(f"Cannot read a model config from {name_or_path}: {_first_line(error)}") from error
    if config.model_type not in SUPPORTED:
        raise UsageError(
            f"{name_or_path} is a {config.model_type!r} model; supported are {', '.join(sorted(SUPPORTED))}."
        )
    return config


def load_processor(
    name_or_path: str, *, max_length: int | None = None, max_pixels: int | None = None
) -> ProcessorMixin:
    """Load a backbone's processor and prepare it (``prepare_processor``).

    :raises CocoaError: If it is not there.
    """
    try:
        processor = AutoProcessor.from_pretrained(resolve_backbone(name_or_path))
    except (OSError, ValueError) as error:
        raise CocoaError(f"Cannot load the processor of {name_or_path}: {_first_line(error)}") from error
    prepare_processor(processor, max_length=max_length, max_pixels=max_pixels)
    return processor


def prepare_processor(
    processor: ProcessorMixin, *, max_length: int | None = None, max_pixels: int | None = None
) -> None:
    """Give a processor the one rendering ``[vision][text]<EOS>``, a mask token, and right padding, in place.

    ``<EOS>`` is appended by the tokenizer's post-processor, which runs after truncation: however long a text is, and
    with or without an image, its sequence ends in ``<EOS>``.

    :raises UsageError: If the largest image would not fit into ``max_length`` tokens.
    """
    tokenizer = processor.tokenizer
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}", pair=f"$A $B:1 {eos}:1", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    tokenizer.padding_side = "right"
    if max_length is not None:
        tokenizer.model_max_length = max_length
    if max_pixels is not None:
        processor.image_processor.size["longest_edge"] = max_pixels
    processor.chat_template = CHAT_TEMPLATE
    tokenizer.chat_template = None
    _check_room_for_images(processor)


def _check_room_for_images(processor: ProcessorMixin) -> None:
    image_processor = processor.image_processor
    largest = image_processor.size["longest_edge"]
    tokens = largest // (image_processor.patch_size * image_processor.merge_size) ** 2
    # The short side of a long image is rounded up to one token, and sides may differ by a factor of 200.
    tokens = max(tokens, math.isqrt(MAX_ASPECT_RATIO * tokens))
    room = processor.tokenizer.model_max_length - 8
    if tokens > room:
        raise UsageError(
            f"An image of up to {largest} pixels takes {tokens} visual tokens, more than the {room} that a sequence of "
            f"{room + 8} has room for; lower max_pixels or raise max_length."
        )


def fit_embeddings(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Widen the token embeddings if the tokenizer has outgrown them (Qwen's matrix has room to spare)."""
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(processor.tokenizer))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _refuse_incomplete_weights(name_or_path: str, info: dict[str, Any]) -> None:
    faults = [
        f"{kind.replace('_keys', '')}: {', '.join(sorted(map(_describe_key, keys)))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (keys := info.get(kind))
    ]
    if faults:
        raise CocoaError(
            f"The weights of {name_or_path} do not fit the model ({'; '.join(faults)}). The checkpoint is "
            "incomplete or was written by an incompatible version; download or convert it again."
        )


def _describe_key(key: str | tuple[str, tuple[int, ...], tuple[int, ...]]) -> str:
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} is {tuple(found)}, not {tuple(expected)}"
