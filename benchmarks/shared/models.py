"""The sizes of the models that are benchmarked, so that nothing has to be downloaded.

``models.json`` has the published sizes of Qwen2-VL-2B, Qwen2.5-VL-3B and -7B and Qwen3-VL-2B: 2.21, 3.75, 8.29 and 2.13
billion parameters. Values that do not affect speed (``rope_theta``) were not checked against the hub. ``small`` is a
model that a CPU can train, with the vocabulary of Qwen2-VL.
"""

import json
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import (
    AutoConfig,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLImageProcessor,
)

from cocoa_embed.model.backbone import Backbone, load_backbone, load_processor, prepare_processor
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.model.families.internvl import InternVL
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.families.squares import Squares
from cocoa_embed.model.template import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START

TOKENIZER = "scene-captioner"
MAX_LENGTH = 32_768

MODELS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def model_config(name: str) -> PreTrainedConfig:
    """Return the config of one of ``MODELS``."""
    return AutoConfig.for_model(**MODELS[name])


def stand_in_processor(config: PreTrainedConfig, *, max_length: int = MAX_LENGTH) -> ProcessorMixin:
    """Return a processor with the demo's tokenizer, and set the config's token ids to those of that tokenizer."""
    processor = load_processor(TOKENIZER, max_length=max_length)
    if isinstance(family := family_of(config), Squares):
        return _squares(config, family, processor.tokenizer)
    processor.image_processor = Qwen2VLImageProcessor(patch_size=config.vision_config.patch_size)
    config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id = (
        processor.tokenizer.convert_tokens_to_ids([IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END])
    )
    return processor


def untrained_model(
    folder: Path, backbone: Backbone | None = None, *, max_length: int = MAX_LENGTH
) -> SentenceTransformer:
    """Write a backbone, by default the demo's, to ``folder``, and return it as an embedding model."""
    (backbone or load_backbone(TOKENIZER, max_length=max_length)).save(folder)
    return build_sentence_transformer(folder, prompts={"query": "", "document": ""})


def _squares(config: PreTrainedConfig, family: Squares, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    side, size = config.vision_config.image_size, family.geometry.patch_size
    if isinstance(family, InternVL):
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        special = dict(zip(names, ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), strict=True))
        tokenizer.add_special_tokens({"additional_special_tokens": [*special.values()]})
        tokenizer._set_model_specific_special_tokens(special)
        images = GotOcr2ImageProcessor(size={"height": side[0], "width": side[1]})
        count = (side[0] // size) ** 2
        processor: Any = InternVLProcessor(images, tokenizer, InternVLVideoProcessor(), image_seq_length=count)
    else:
        names = ("<fake_token_around_image>", "<global-img>", "<image>")
        tokenizer.add_special_tokens({"additional_special_tokens": [*names]})
        images = Idefics3ImageProcessor(max_image_size={"longest_edge": side})
        processor = Idefics3Processor(images, tokenizer, image_seq_len=(side // size) ** 2)
    prepare_processor(processor)
    config.image_token_id = processor.image_token_id
    return processor  # type: ignore[no-any-return]
