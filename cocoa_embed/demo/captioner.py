"""Pretrains the demo's backbone: a Qwen2-VL of 3 million parameters, a causal captioner of the scenes.

CoCoA starts from a vision-language model that can already read an image. The package ships this one, made by::

    python -m cocoa_embed.demo.captioner --out cocoa_embed/backbones/scene-captioner --seed 0

Its tokenizer is trained on captions of training scenes and has Qwen2-VL's special tokens. It sees training scenes only,
so its weights hold nothing of a held-out scene.
"""

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)

from cocoa_embed.demo.scenes import captions, distinct_scenes, draw, sample_scene
from cocoa_embed.model.template import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, chat_template

PAD = "<|endoftext|>"
EOS = "<|im_end|>"
QWEN_SPECIAL_TOKENS = (PAD, "<|im_start|>", EOS, VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)

VOCABULARY_SIZE = 768
MAX_PIXELS = 112 * 112
MIN_PIXELS = 28 * 28
CAPTIONS_FOR_TOKENIZER = 4000
PROMPT_WORDS = ("query: find the image or text that matches", "document: represent this image or text for search")


def build_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer on captions of training scenes, its special tokens named as Qwen's."""
    generator = random.Random(f"{seed}/tokenizer")
    scenes = islice(distinct_scenes(generator, "train"), CAPTIONS_FOR_TOKENIZER)
    corpus = [generator.choice(captions(scene)) for scene in scenes] + [*PROMPT_WORDS] * 10
    blank = Qwen2Tokenizer(eos_token=EOS, pad_token=PAD, unk_token=None)  # pyright: ignore[reportArgumentType]  None is allowed
    trained = blank.train_new_from_iterator(
        corpus, vocab_size=VOCABULARY_SIZE - 64, new_special_tokens=list(QWEN_SPECIAL_TOKENS)
    )
    trained.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL_TOKENS)})
    return trained


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Return a processor with this tokenizer, bounds on the pixels of an image, and the chat template."""
    bounds = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=bounds),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=bounds),
        chat_template=chat_template(tokenizer),
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """Return the captioner with random weights: about 3 million parameters in float32."""
    width, heads, ids = 192, 6, tokenizer.get_vocab()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": -(-(len(tokenizer) + 1) // 64) * 64,
            "hidden_size": width,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={"depth": 4, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 4, "hidden_size": width},
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


class CaptionedScenes(IterableDataset[dict[str, Any]]):
    """An endless stream of drawn training scenes, each with one of its captions."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = random.Random(f"{self.seed}/captioner")
        while True:
            scene = sample_scene(generator, "train")
            yield {"image": draw(scene, generator), "text": generator.choice(captions(scene))}


class CaptionCollator:
    """Makes batches of ``[vision][caption]<EOS>``; every token after the image is a label."""

    def __init__(self, processor: Qwen2VLProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` ``[rows, length]``, and the images' patches."""
        texts = [f"{VISION_START}{IMAGE_PAD}{VISION_END}{row['text']}{EOS}" for row in rows]
        batch = self.processor(images=[row["image"] for row in rows], text=texts, padding=True, return_tensors="pt")
        after_image = batch["input_ids"] == self.processor.tokenizer.convert_tokens_to_ids(VISION_END)
        is_caption = (after_image.cumsum(1) - after_image.int()).bool() & batch["attention_mask"].bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~is_caption, -100)}


def pretrain(out: Path, seed: int = 0, *, steps: int = 3000, batch_size: int = 64, learning_rate: float = 1e-3) -> None:
    """Pretrain the captioner and write it to ``out`` (bfloat16 safetensors, processor, config)."""
    set_seed(seed)
    processor = build_processor(build_tokenizer(seed))
    model = build_model(processor.tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            weight_decay=0.05,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            # The dispatcher would cut pixel_values, which has a row for each patch, to the number of captions.
            accelerator_config={"dispatch_batches": False},
            seed=seed,
        ),
        train_dataset=CaptionedScenes(seed),
        data_collator=CaptionCollator(processor),
    )
    trainer.train()
    model.bfloat16().save_pretrained(out)
    processor.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain the demo's backbone.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    pretrain(**vars(parser.parse_args()))
