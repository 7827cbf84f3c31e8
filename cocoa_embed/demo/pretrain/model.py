"""The model: a stock Qwen2-VL with random weights, or around a language model on disk."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLTextConfig,
)

from cocoa_embed.demo.pretrain.settings import ModelSettings
from cocoa_embed.demo.pretrain.tokenizer import EOS, PAD, QWEN_SPECIAL_TOKENS
from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.model.template import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START

LANGUAGE_MODELS = ("llama", "qwen2")
"""Families that equal Qwen2-VL's language model except for the biases of the attention, which may be zero."""

OWN_KEYS = {"model_type", "architectures", "transformers_version", "dtype", "vocab_size", "rope_parameters"}
"""Keys of a language model's config for which Qwen2-VL's config has its own values."""

PROBE = "Two dogs run on a beach, and a man in a red shirt watches them."


class LanguageModel(NamedTuple):
    """A language model inside a Qwen2-VL: the whole model, its tokenizer, and the ids of tokens that were added."""

    model: Qwen2VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    new_tokens: list[int]


def build_model(tokenizer: PreTrainedTokenizerBase, sizes: ModelSettings) -> Qwen2VLForConditionalGeneration:
    """Return a captioner with random weights, float32."""
    text = {
        "vocab_size": matrix_rows(tokenizer),
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner_width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": tokenizer.pad_token_id,
    }
    return _around(text, tokenizer, sizes, tied=True)


def embed_language_model(folder: Path, sizes: ModelSettings) -> LanguageModel:
    """Put a language model on disk inside a Qwen2-VL with a random vision encoder.

    Qwen's special tokens are added if its tokenizer lacks them; their embeddings are the mean of all others. The logits
    of texts are those of the language model: M-RoPE of a text is plain RoPE, and biases that it lacks are zero.

    :raises UsageError: If its architecture does not fit into a Qwen2-VL.
    :raises CocoaError: If it cannot be loaded.
    """
    name = printable(folder)
    if not folder.is_dir():
        raise CocoaError(f"{name} does not exist; give the folder of a language model with its tokenizer.")
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in LANGUAGE_MODELS:
            raise UsageError(f"{name} is a {config.model_type!r} model; --language-model takes "
                             f"{' or '.join(LANGUAGE_MODELS)}.")  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as error:
        raise CocoaError(f"{name} cannot be loaded as a language model ({one_line(error)}).") from error
    added = [token for token in QWEN_SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.chat_template, tokenizer.eos_token = None, tokenizer.eos_token or EOS
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = PAD
    text = {key: value for key, value in config.to_dict().items() if key in TEXT_KEYS}
    text |= {"vocab_size": max(config.vocab_size, matrix_rows(tokenizer)), "rope_parameters": config.rope_parameters}
    new_tokens = tokenizer.convert_tokens_to_ids(added)
    try:
        model = _around(text, tokenizer, sizes, tied=config.tie_word_embeddings).eval()
        _load_language_model(model, original, new_tokens)
        probe = tokenizer(PROBE, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = original(probe).logits
            difference = model(probe).logits[..., : expected.shape[-1]] - expected
            difference[..., [token for token in new_tokens if token < expected.shape[-1]]] = 0
    except (RuntimeError, ValueError) as error:  # weights of other names or shapes
        raise UsageError(f"{name} does not fit into a Qwen2-VL ({one_line(error)}).") from error
    if not (largest := difference.abs().max().item()) <= 1e-3 * expected.abs().max().item():
        raise UsageError(f"{name} does not fit into a Qwen2-VL: the logits of a text differ by up to {largest:.2g}, so "
                         "its config has something that Qwen2-VL's lacks.")  # fmt: skip
    return LanguageModel(model.train(), tokenizer, new_tokens)


TEXT_KEYS = Qwen2VLTextConfig().to_dict().keys() - OWN_KEYS


def matrix_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of rows of an embedding matrix, a multiple of 64 with room for a mask token."""
    return -(-(len(tokenizer) + 1) // 64) * 64


def _around(
    text: dict[str, Any], tokenizer: PreTrainedTokenizerBase, sizes: ModelSettings, *, tied: bool
) -> Qwen2VLForConditionalGeneration:
    """Return a Qwen2-VL with random weights, whose language model has the config ``text``."""
    ids = tokenizer.get_vocab()
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    config = Qwen2VLConfig(
        text_config={
            **text,
            "rope_parameters": {**text["rope_parameters"], "mrope_section": sections},
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": sizes.vision_layers,
            "embed_dim": sizes.vision_width,
            "num_heads": sizes.vision_heads,
            "mlp_ratio": 4,
            "hidden_size": text["hidden_size"],
            "patch_size": sizes.patch_size,
            "spatial_merge_size": sizes.merge_size,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=tied,
    )
    return Qwen2VLForConditionalGeneration(config)


@torch.no_grad()
def _load_language_model(model: Qwen2VLForConditionalGeneration, original: Any, new_tokens: list[int]) -> None:  # noqa: ANN401
    """Copy the weights; the rows of tokens that the original lacks are the mean of its rows."""

    def widened(rows: torch.Tensor) -> torch.Tensor:
        wide = rows.mean(0).repeat(model.lm_head.out_features, 1)
        wide[: len(rows)] = rows
        wide[new_tokens] = rows.mean(0)
        return wide

    decoder = model.model.language_model
    weights = original.model.state_dict()
    weights["embed_tokens.weight"] = widened(weights["embed_tokens.weight"])
    state = decoder.state_dict()
    biases = {name: torch.zeros_like(each) for name, each in state.items() if name.endswith("_proj.bias")}
    decoder.load_state_dict({**biases, **weights})
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.copy_(widened(original.lm_head.weight))
