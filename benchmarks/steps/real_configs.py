"""The configs of the models that are trained, as data, so that a benchmark needs no download.

The sizes are the published ones of Qwen2-VL-2B, Qwen2.5-VL-3B and -7B and Qwen3-VL-2B; the models built from them have
2.21, 3.75, 8.29 and 2.13 billion parameters. What changes no speed (``rope_theta``) was not checked against the hub.
``small`` is none of them: a body that a CPU can train under Qwen2-VL's own vocabulary.
"""

from typing import Any

from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

QWEN2_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
QWEN3_ROPE = {
    "rope_type": "default",
    "rope_theta": 5_000_000.0,
    "mrope_section": [24, 20, 20],
    "mrope_interleaved": True,
}
QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}

MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], dict[str, Any], bool]] = {
    "small": (
        Qwen2VLConfig,
        {
            "vocab_size": 151_936,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        },
        {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 128},
        True,
    ),
    "qwen2-vl-2b": (
        Qwen2VLConfig,
        {
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_parameters": QWEN2_ROPE,
        },
        {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536},
        True,
    ),
    "qwen2.5-vl-3b": (
        Qwen2_5_VLConfig,
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rope_parameters": QWEN2_ROPE,
        },
        {**QWEN2_5_VISION, "out_hidden_size": 2048},
        True,
    ),
    "qwen2.5-vl-7b": (
        Qwen2_5_VLConfig,
        {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": QWEN2_ROPE,
        },
        {**QWEN2_5_VISION, "out_hidden_size": 3584},
        False,
    ),
    "qwen3-vl-2b": (
        Qwen3VLConfig,
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": QWEN3_ROPE,
        },
        {
            "depth": 24,
            "hidden_size": 1024,
            "num_heads": 16,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "deepstack_visual_indexes": [5, 11, 17],
            "num_position_embeddings": 2304,
        },
        True,
    ),
}
"""Name to config class, text config, vision config, and whether the embeddings are tied."""


def real_config(name: str) -> PreTrainedConfig:
    """Return the config of one of ``MODELS``."""
    config_class, text, vision, tied = MODELS[name]
    return config_class(
        text_config={**text, "tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied
    )
