"""Random tiny backbones of every supported family, each with its own processor and its own way of seeing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    GotOcr2ImageProcessor,
    GPT2Tokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
)

from cocoa_embed.demo.pretrain.tokenizer import build_processor, build_tokenizer
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.families.internvl import InternVL
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.families.squares import Squares
from cocoa_embed.model.template import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, chat_template
from cocoa_embed.train.recipe import Recipe

WIDTH = 32
VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": WIDTH}
SQUARES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARES["image_size"] = 64

TINY_MAX_LENGTH = 128
SCENES = 24
"""Images of the fixture ``scene_folder``."""

MakeRecipe = Callable[..., Recipe]
"""Makes a recipe with the tiny backbone and the drawn scenes; keywords change it."""

LoadTiny = Callable[[str], Backbone]
"""Loads the tiny backbone with an attention implementation."""

COCOA = ("warmup", "bridge", "contrastive")
"""The stages of CoCoA, in their order."""

STAGE: dict[str, Any] = {"steps": 2, "batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
STAGE["warmup_steps"] = 0
"""The settings of a stage of a tiny run."""


def text_config(tokenizer: Qwen2Tokenizer, **changes: Any) -> dict[str, Any]:
    """Return the smallest language model that still has several layers, heads and grouped keys."""
    return {
        "vocab_size": len(tokenizer) + 1,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        # The standard 0.02 leaves so small a model nearly constant: nothing would reach anything.
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        **changes,
    }


def special_ids(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """Return what ties a config to the tokenizer."""
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_PAD),
        "video_token_id": tokenizer.convert_tokens_to_ids(VIDEO_PAD),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids(VISION_START),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids(VISION_END),
        "tie_word_embeddings": True,
    }


def qwen2_vl(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    config = Qwen2VLConfig(
        text_config=text_config(tokenizer),
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": WIDTH},
        **special_ids(tokenizer),
    )
    return Qwen2VLForConditionalGeneration(config), build_processor(tokenizer)


def qwen2_5_vl(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Attend in windows of 56 pixels in the first vision layer, over the whole image in the second."""
    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer),
        vision_config={**VISION, "fullatt_block_indexes": [1], "window_size": 56},
        **special_ids(tokenizer),
    )
    parts = build_processor(tokenizer)
    processor = Qwen2_5_VLProcessor(parts.image_processor, tokenizer, parts.video_processor, chat_template(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Patches of 16 pixels; the features of one vision layer enter the language model's first layer too."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=text_config(tokenizer, head_dim=8, rope_parameters=rope),
        vision_config={**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        **special_ids(tokenizer),
    )
    one_to_sixteen_tokens = {"shortest_edge": 32**2, "longest_edge": 16 * 32**2}
    images = Qwen2VLImageProcessor(size=one_to_sixteen_tokens, patch_size=16)
    videos = Qwen3VLVideoProcessor(size=one_to_sixteen_tokens)
    processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template(tokenizer))
    return Qwen3VLForConditionalGeneration(config), processor


def smolvlm(
    tokenizer: Qwen2Tokenizer,
    config_class: type[PreTrainedConfig] = Idefics3Config,
    model_class: type[PreTrainedModel] = Idefics3ForConditionalGeneration,
    images: type[Idefics3ImageProcessor | SmolVLMImageProcessor] = Idefics3ImageProcessor,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Images of 64 x 64 pixels: 64 patches, and of four each a visual token; a tokenizer of the class of SmolVLM's."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    own = GPT2Tokenizer(
        backend["vocab"],
        [tuple(pair) for pair in backend["merges"]],
        pad_token=tokenizer.pad_token,
        eos_token="<end_of_utterance>",
        unk_token=None,
        bos_token=None,
        truncation_side="left",  # as SmolVLM's
    )
    own.add_special_tokens({"additional_special_tokens": ["<fake_token_around_image>", "<global-img>", "<image>"]})
    processor = Idefics3Processor(
        images(size={"longest_edge": 256}, max_image_size={"longest_edge": 64}), own, image_seq_len=16
    )
    text = text_config(own, model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config = config_class(
        text_config=text,
        vision_config={**SQUARES, "patch_size": 8},
        scale_factor=2,
        image_token_id=own.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    return model_class(config), processor


def smolvlm2(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The same under its own names."""
    return smolvlm(tokenizer, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor)


def internvl(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Images of 64 x 64 pixels, or up to six tiles of that: 64 patches, and of four each a visual token."""
    tokens = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokens["video_token"] = "<video>"
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens.values()]})
    tokenizer._set_model_specific_special_tokens(tokens)
    size = {"height": 64, "width": 64}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=6),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=16,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = InternVLConfig(
        text_config=text_config(tokenizer, model_type="qwen2", rope_parameters=rope),
        vision_config={**SQUARES, "patch_size": 8, "layer_scale_init_value": 1.0},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[Qwen2Tokenizer], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "idefics3": smolvlm,
    "smolvlm": smolvlm2,
    "internvl": internvl,
}


def _families(slow: set[str]) -> pytest.MarkDecorator:
    marked = [pytest.param(each, marks=pytest.mark.slow if each in slow else ()) for each in FAMILIES]
    return pytest.mark.parametrize("family", marked, indirect=True, scope="session")


every_family = _families({"smolvlm", "internvl"})
"""Runs a test, or a module as its ``pytestmark``, once for each family instead of for Qwen2-VL alone.

InternVL3, whose images are squares as SmolVLM's, and SmolVLM2, which has its modules, are among the slow tests.
"""

every_family_but_twins = _families({"smolvlm"})
"""The same with InternVL3 among the quick tests: for those from the first stage to the export."""

every_qwen = pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name.startswith("qwen")], indirect=True, scope="session"
)
"""The same for those whose images are rows of patches in the stock class, too."""

every_family_slowly = _families({*FAMILIES} - {"qwen2_vl"})
"""The same, with all families but Qwen2-VL among the slow tests."""


def write_tiny_backbone(family: str, folder: Path) -> None:
    """Write a random backbone, causal as Qwen's are, with its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = FAMILIES[family](build_tokenizer(0))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if family == "smolvlm":  # as its authors left it, for a processor that asks for num2words
        path = folder / "processor_config.json"
        own = {
            "processor_class": "SmolVLMProcessor",
            "video_processor": {"video_processor_type": "SmolVLMVideoProcessor"},
        }
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))


def stock_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the stock class takes of a batch: whole squares, those of all rows together."""
    family = family_of(model.config)
    if not isinstance(family, Squares):
        return {name: value for name, value in batch.items() if name != "image_digests"}
    stock = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "pixel_values" in batch:
        images = family.images(batch["pixel_values"], batch["image_grid_thw"])
        stock["pixel_values"] = images if isinstance(family, InternVL) else images[None]
    return stock


CLIP_LENGTH = 16


def tiny_clip_model(folder: Path) -> SentenceTransformer:
    """Return a random tiny CLIP, a model that is none of ours, whose texts are spelt letter by letter."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_LENGTH)
    size = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**size, **ids, "vocab_size": len(tokens), "max_position_embeddings": CLIP_LENGTH},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder))], device="cpu")
