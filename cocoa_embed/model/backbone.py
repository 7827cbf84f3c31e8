"""Load a vision-language backbone with complete weights and prepare its processor."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from cocoa_embed.errors import CocoaError, UsageError, one_line
from cocoa_embed.model.attention import make_bidirectional, make_causal
from cocoa_embed.model.families.registry import family_of, family_of_images
from cocoa_embed.model.flex_attention import FLEX, use_flex_attention
from cocoa_embed.model.loading import is_hub_name
from cocoa_embed.model.template import add_eos_tokens, append_eos, chat_template, eos_tokens
from cocoa_embed.model.training_record import refuse_unfinished
from cocoa_embed.model.vision_attention import pack_vision_attention

MASK_TOKEN = "<|mask|>"
"""Replaces a masked text token; added to tokenizers without a mask token, such as Qwen's."""

OTHER_TOKENS = 8
"""Tokens of a sequence that are kept free in addition to the largest image and all vectors but the first."""

NEW_EOS_NOISE = 1.0
"""The standard deviation of the noise in a new token's embedding, relative to that of the embedding of ``<EOS>``.

With a tenth of it, the states of four tokens stayed alike (docs/experiments.md, section 22).
"""

Origin = Literal["folder", "built-in", "hub"]
"""The kind of a backbone's source."""


@dataclass(frozen=True)
class Backbone:
    """A vision-language model and the processor that renders its inputs."""

    model: PreTrainedModel
    processor: ProcessorMixin

    def save(self, folder: Path) -> None:
        """Write weights, config and processor to ``folder``."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def builtin_backbones() -> list[str]:
    """Return the names of the backbones that ship with the package."""
    return sorted(entry.name for entry in (files("cocoa_embed") / "backbones").iterdir() if entry.is_dir())


def origin(name_or_path: str) -> Origin:
    """Return the source of a backbone: an existing folder, otherwise a built-in backbone, otherwise the hub.

    :raises CocoaError: If it is none of the three, or the folder of a stage that is not finished.
    """
    refuse_unfinished(Path(name_or_path))
    if Path(name_or_path).is_dir():
        return "folder"
    if name_or_path in builtin_backbones():
        return "built-in"
    if not is_hub_name(name_or_path):
        raise CocoaError(
            f"No backbone {name_or_path!r}: it is neither a folder nor one of this package's "
            f"({', '.join(builtin_backbones())}); give a folder, one of those, or a hub name such as "
            "Qwen/Qwen2-VL-2B-Instruct."
        )
    return "hub"


def resolve_backbone(name_or_path: str) -> str:
    """Return the folder or hub name from which transformers loads ``name_or_path``."""
    if origin(name_or_path) == "built-in":
        return str(files("cocoa_embed") / "backbones" / name_or_path)
    return name_or_path


def load_backbone(
    name_or_path: str,
    *,
    attn_implementation: str = "sdpa",
    max_length: int | None = None,
    max_pixels: int | None = None,
    bidirectional: bool = True,
    vectors: int | None = None,
) -> Backbone:
    """Load a backbone from a folder, by a built-in name or by a hub name, and make it bidirectional.

    :param attn_implementation: ``sdpa``, ``eager``, or ``flex_attention`` for the language model under a ``BlockMask``.
    :param max_length: The maximum tokens of a sequence, stored in the tokenizer; by default the tokenizer's own limit.
    :param max_pixels: The maximum pixels of an image, stored in the image processor; by default its own limit.
    :param bidirectional: False leaves the model causal, as a baseline.
    :param vectors: The number of ``eos_tokens``; by default as many as the backbone has. New tokens start with the
        embedding of ``<EOS>`` plus noise, the same in each call.
    :raises CocoaError: If the backbone does not exist, or weights are missing, unexpected or of another shape.
    :raises UsageError: If its model type is not supported.
    """
    config = read_config(name_or_path)
    location = resolve_backbone(name_or_path)
    try:
        loaded: Any = family_of(config).model_class.from_pretrained(
            location,
            dtype=torch.float32,
            attn_implementation="sdpa" if attn_implementation == FLEX else attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except (OSError, SafetensorError) as error:
        raise CocoaError(f"Cannot load weights from {name_or_path}: {one_line(error)}") from error
    model, info = loaded
    kinds = ("missing", "unexpected", "mismatched")
    faults = [f"{kind}: {', '.join(sorted(map(str, keys)))}" for kind in kinds if (keys := info.get(f"{kind}_keys"))]
    if faults:
        raise CocoaError(
            f"The weights of {name_or_path} do not fit the model ({'; '.join(faults)}). The checkpoint is "
            "incomplete or was written by an incompatible version; download or convert it again."
        )
    processor = read_processor(name_or_path)
    known = len(eos_tokens(processor.tokenizer))
    prepare_processor(processor, max_length=max_length, max_pixels=max_pixels, vectors=vectors)
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:  # Qwen's matrix has spare rows
        model.resize_token_embeddings(len(processor.tokenizer))
    tokens = eos_tokens(processor.tokenizer)
    if len(tokens) > known:
        _start_new_eos(model, processor.tokenizer.convert_tokens_to_ids(tokens), known)
    (make_bidirectional if bidirectional else make_causal)(model)
    if attn_implementation == FLEX:
        use_flex_attention(model)
    if attn_implementation != "eager":
        pack_vision_attention(model)
    return Backbone(model=model, processor=processor)


@torch.no_grad()
def _start_new_eos(model: PreTrainedModel, ids: list[int], known: int) -> None:
    """Set the embeddings of the tokens after the first ``known`` to that of the first, plus noise."""
    weight: Any = model.get_input_embeddings().weight
    noise = torch.randn(len(ids), weight.shape[1], generator=torch.Generator().manual_seed(0))
    weight[ids[known:]] = weight[ids[0]] + NEW_EOS_NOISE * weight[ids[0]].std() * noise[known:].to(weight)


def read_config(name_or_path: str) -> PreTrainedConfig:
    """Read a backbone's config.

    :raises CocoaError: If it does not exist.
    :raises UsageError: If its model type is not supported.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_backbone(name_or_path))
    except (OSError, ValueError) as error:
        raise CocoaError(f"Cannot read a model config from {name_or_path}: {one_line(error)}") from error
    family_of(config, name_or_path)
    return config


def load_processor(
    name_or_path: str, *, max_length: int | None = None, max_pixels: int | None = None, vectors: int | None = None
) -> ProcessorMixin:
    """Load a backbone's processor and prepare it (``prepare_processor``).

    :raises CocoaError: If it does not exist.
    """
    processor = read_processor(name_or_path)
    prepare_processor(processor, max_length=max_length, max_pixels=max_pixels, vectors=vectors)
    return processor


def read_processor(name_or_path: str) -> ProcessorMixin:
    """Load a backbone's processor unchanged.

    :raises CocoaError: If it does not exist.
    """
    try:
        family = family_of(read_config(name_or_path))
        processor: ProcessorMixin = family.processor_class.from_pretrained(resolve_backbone(name_or_path))
    except (OSError, ValueError) as error:
        raise CocoaError(f"Cannot load the processor of {name_or_path}: {one_line(error)}") from error
    return processor


def prepare_processor(
    processor: ProcessorMixin,
    *,
    max_length: int | None = None,
    max_pixels: int | None = None,
    vectors: int | None = None,
) -> None:
    """Make a processor render ``[vision][text]<EOS>``, with a mask token and right padding, in place.

    The tokenizer appends ``<EOS>`` after truncation (``append_eos``), so every sequence ends in it: texts of any
    length, with or without an image.

    :param vectors: The number of ``eos_tokens``, some of which may be new; by default as many as the tokenizer has.
    :raises UsageError: If the largest image would not fit into ``max_length`` tokens, or the tokenizer has more
        ``eos_tokens``.
    """
    tokenizer = processor.tokenizer
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    if vectors is not None:
        add_eos_tokens(tokenizer, vectors)
    append_eos(tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if max_length is not None:
        tokenizer.model_max_length = max_length
    limit_images(processor, max_pixels)
    processor.chat_template = chat_template(tokenizer, family_of_images(processor).markers)
    tokenizer.chat_template = None


def fitting_max_pixels(name_or_path: str, max_length: int, vectors: int = 1) -> int | None:
    """Return a limit for images if a backbone's own limit does not fit into ``max_length`` tokens, otherwise None.

    With it, the largest square image takes half of a sequence, or less if a long, narrow one would not fit.

    :param vectors: The number of ``eos_tokens``.
    :raises CocoaError: If the backbone's processor cannot be loaded.
    :raises UsageError: If ``max_length`` is too short for any image.
    """
    processor = load_processor(name_or_path)
    family, room = family_of_images(processor), _room_for_image(max_length, vectors)
    if family.most_visual_tokens(processor) <= room:
        return None
    geometry = family.image_geometry(processor)
    for tokens in range(max_length // 2, 0, -1):
        pixels = tokens * (geometry.patch_size * geometry.merge_size) ** 2
        family.limit_pixels(processor, pixels)
        if family.most_visual_tokens(processor) <= room:
            return family.most_pixels(processor)
    raise UsageError(
        f"max_length is {max_length}, too short for an image with {name_or_path}{_beside(vectors)}; raise it."
    )


def _room_for_image(max_length: int, vectors: int) -> int:
    """Return the maximum visual tokens of a sequence that ends in ``vectors`` ``<EOS>``."""
    return max(0, max_length - OTHER_TOKENS - vectors + 1)


def _beside(vectors: int) -> str:
    return f" in addition to {vectors} <EOS>" if vectors > 1 else ""


def limit_images(processor: ProcessorMixin, max_pixels: int | None) -> None:
    """Have a processor scale images down to ``max_pixels``, in place; None keeps its own limit.

    :raises UsageError: If the largest image would not fit into a sequence, a visual token has more pixels than
        ``max_pixels``, or the processor is not that of a supported model.
    """
    family = family_of_images(processor)
    geometry = family.image_geometry(processor)
    side = geometry.patch_size * geometry.merge_size
    if max_pixels is not None and max_pixels < side**2:
        raise UsageError(f"max_pixels is {max_pixels}, but a visual token has {side} x {side}; raise it.")
    family.limit_pixels(processor, max_pixels)
    largest, tokens = family.most_pixels(processor), family.most_visual_tokens(processor)
    vectors, length = len(eos_tokens(processor.tokenizer)), processor.tokenizer.model_max_length
    room = _room_for_image(length, vectors)
    if tokens > room:
        raise UsageError(
            f"An image of up to {largest} pixels takes {tokens} visual tokens, more than the {room} that a sequence of "
            f"{length} has room for{_beside(vectors)}; lower max_pixels or raise max_length."
        )
