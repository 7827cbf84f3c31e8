"""A random tiny Qwen2-VL and a few drawn scenes, for every test that needs a model or data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from cocoa_embed.backbone import Backbone, load_backbone
from cocoa_embed.demo.captioner import build_processor, build_tokenizer
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.template import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from cocoa_embed.train.data import Row, read_image_folder

# A shared machine may stall any example; what a test shows does not depend on its time.
settings.register_profile("cocoa-embed", deadline=None)
settings.load_profile("cocoa-embed")

TINY_MAX_LENGTH = 128
SCENES = 24

LoadTiny = Callable[[str], Backbone]


def tiny_config(tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    """Return the smallest config that still has several layers, heads and grouped keys."""
    width = 32
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": width,
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
        },
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": width},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PAD),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_PAD),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(VISION_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(VISION_END),
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def tiny_backbone_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random tiny Qwen2-VL, causal as Qwen's are, with its processor."""
    folder = tmp_path_factory.mktemp("tiny-backbone")
    processor = build_processor(build_tokenizer(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(tiny_config(processor.tokenizer))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def load_tiny(tiny_backbone_path: Path) -> LoadTiny:
    """Load the tiny backbone with an attention implementation of the test's choice."""

    def load(attn_implementation: str) -> Backbone:
        backbone = load_backbone(
            str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, attn_implementation=attn_implementation
        )
        backbone.model.eval()
        return backbone

    return load


@pytest.fixture
def tiny_backbone(tiny_backbone_path: Path) -> Backbone:
    """The tiny backbone, loaded anew and bidirectional: a test may change it."""
    return load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 24 drawn training scenes."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_image_folder(folder, "train", SCENES, seed=0)
    return folder


@pytest.fixture(scope="session")
def scene_rows(scene_folder: Path) -> list[Row]:
    """The scenes as image-caption rows, one for each image."""
    return read_image_folder(scene_folder)
