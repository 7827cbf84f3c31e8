"""The tokenizer, trained on captions, with Qwen2-VL's special tokens, and the processor that contains it."""

import random
from collections.abc import Iterable
from itertools import islice

from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from cocoa_embed.demo.pretrain.settings import PRESETS, SCENES, ModelSettings
from cocoa_embed.demo.scenes import captions, distinct_scenes
from cocoa_embed.model.template import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, chat_template

PAD = "<|endoftext|>"
EOS = "<|im_end|>"
QWEN_SPECIAL_TOKENS = (PAD, "<|im_start|>", EOS, VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)

SPARE_TOKENS = 64
"""Rows of the embedding matrix that are reserved for special tokens."""

SCENES_FOR_TOKENIZER = 4000
PROMPT_WORDS = ("query: find the image or text that matches", "document: represent this image or text for search")

SCENE_MODEL = ModelSettings.model_validate(PRESETS[SCENES]["model"])


def build_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Train the tokenizer of the package's own captioner, on captions of training scenes."""
    generator = random.Random(f"{seed}/tokenizer")
    scenes = islice(distinct_scenes(generator, "train"), SCENES_FOR_TOKENIZER)
    return train_tokenizer((generator.choice(captions(scene)) for scene in scenes), SCENE_MODEL.vocabulary)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer of at most ``vocabulary`` tokens, with special tokens named like Qwen's."""
    blank = Qwen2Tokenizer(eos_token=EOS, pad_token=PAD, unk_token=None)  # pyright: ignore[reportArgumentType]  None is allowed
    trained = blank.train_new_from_iterator(
        [*texts, *[*PROMPT_WORDS] * 10],
        vocab_size=vocabulary - SPARE_TOKENS,
        new_special_tokens=list(QWEN_SPECIAL_TOKENS),
    )
    trained.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL_TOKENS)})
    return trained


def build_processor(tokenizer: PreTrainedTokenizerBase, sizes: ModelSettings = SCENE_MODEL) -> Qwen2VLProcessor:
    """Return a processor with this tokenizer, bounds on the pixels of an image, and the chat template."""
    bounds = {"shortest_edge": sizes.token_size**2, "longest_edge": sizes.image_size**2}
    patches = {"patch_size": sizes.patch_size, "merge_size": sizes.merge_size}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=bounds, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=bounds, **patches),
        chat_template=chat_template(tokenizer),
    )
