import json
from copy import copy
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from cocoa_embed.data.rows import Item
from cocoa_embed.demo.pretrain import tokenizer as tokenizers
from cocoa_embed.demo.pretrain.model import build_model, embed_language_model
from cocoa_embed.demo.pretrain.settings import ModelSettings
from cocoa_embed.demo.pretrain.tokenizer import (
    QWEN_SPECIAL_TOKENS,
    SPARE_TOKENS,
    build_processor,
    build_tokenizer,
    train_tokenizer,
)
from cocoa_embed.demo.scenes import captions, sample_scene
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.backbone import Backbone, load_backbone, prepare_processor, resolve_backbone
from cocoa_embed.model.template import IMAGE_PAD
from cocoa_embed.train.stages.rendering import render_items

SIZES = ModelSettings(vision_width=32, vision_layers=1, vision_heads=2, image_size=56)
TEXTS = ["a dog runs on a beach", "two men, in a car; 12 red hats", "Ein Hund läuft über den Strand."]
LANGUAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LANGUAGE |= {"num_key_value_heads": 1, "vocab_size": 600, "initializer_range": 0.5}


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer(0)


@pytest.fixture(scope="module")
def plain_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer that has an end of text but none of Qwen's tokens for images."""
    blank = Qwen2Tokenizer(eos_token="</s>", pad_token=None, unk_token=None)
    return blank.train_new_from_iterator(TEXTS, vocab_size=400, new_special_tokens=["</s>"])


def language_model(folder: Path, model: PreTrainedModel, tokenizer: Qwen2Tokenizer | None) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def test_the_tokenizer_sees_training_scenes_alone_and_is_lossless(
    tokenizer: Qwen2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Mock(side_effect=tokenizers.distinct_scenes)
    monkeypatch.setattr(tokenizers, "distinct_scenes", drawn)
    assert build_tokenizer(0).get_vocab() == tokenizer.get_vocab()
    assert [call.args[1] for call in drawn.call_args_list] == ["train"]
    scenes = captions(sample_scene(tokenizers.random.Random(1), "train"))
    for text in (*QWEN_SPECIAL_TOKENS, *scenes, "Über 12 Straßen – 日本"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_shipped_processor_is_the_one_that_the_command_writes(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    build_processor(copy(tokenizer)).save_pretrained(tmp_path)
    shipped = Path(resolve_backbone("scene-captioner"))
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer_config.json"):
        assert (shipped / name).read_bytes() == (tmp_path / name).read_bytes(), name
    written, ours = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, shipped))
    assert {**written, "padding": None} == {**ours, "padding": None}, "padding is that of the last batch"


def test_a_tokenizer_leaves_room_for_special_tokens_in_its_vocabulary() -> None:
    texts = [f"{word} and {word}s" for word in map(str, range(1000))]
    assert [len(train_tokenizer(texts, size)) + SPARE_TOKENS for size in (340, 370)] == [340, 370]


def test_a_model_of_other_patches_sees_as_many_tokens_as_its_processor_makes(
    tokenizer: Qwen2Tokenizer, scene_folder: Path
) -> None:
    sizes = SIZES.model_copy(update={"patch_size": 8, "merge_size": 1, "image_size": 56})
    processor = build_processor(copy(tokenizer), sizes)
    prepare_processor(processor, max_length=256)
    batch = render_items(processor, [Item(text="a", images=(scene_folder / "00000.png",))])
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE_PAD)).sum() == (56 // 8) ** 2
    model = build_model(tokenizer, sizes)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    assert torch.isfinite(model(**{name: batch[name] for name in names}).logits).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama3-rope"])
@pytest.mark.parametrize("tied", [True, False])
def test_text_logits_are_those_of_the_language_model_alone_and_in_a_saved_backbone(
    family: str, tied: bool, plain_tokenizer: Qwen2Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = {**LANGUAGE, "tie_word_embeddings": tied}
    if family == "qwen2":
        original: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**config))
        for name, bias in original.named_parameters():
            if name.endswith("_proj.bias"):
                torch.nn.init.normal_(bias)
    else:
        rope = {"rope_type": "default", "rope_theta": 50000.0}
        if family == "llama3-rope":
            rope = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
        original = LlamaForCausalLM(LlamaConfig(**config, rope_parameters=rope))
    folder = language_model(tmp_path / "language", original.eval(), plain_tokenizer)
    built = embed_language_model(folder, SIZES)
    added = set(QWEN_SPECIAL_TOKENS)
    assert set(built.tokenizer.convert_ids_to_tokens(built.new_tokens)) == added
    assert built.tokenizer.eos_token == "</s>"
    Backbone(built.model, build_processor(built.tokenizer, SIZES)).save(tmp_path / "backbone")
    saved = load_backbone(str(tmp_path / "backbone"), max_length=64, bidirectional=False)
    ids = plain_tokenizer(TEXTS[1] * 3, return_tensors="pt").input_ids
    known = [token for token in range(600) if token not in built.new_tokens]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[..., known]
        assert expected.std() > 0.1
        for model in (built.model.eval(), saved.model.eval()):
            torch.testing.assert_close(model(ids).logits[..., known], expected, rtol=1e-4, atol=1e-4)


def test_a_backbone_around_a_language_model_ends_every_text_in_its_own_end_of_text(
    plain_tokenizer: Qwen2Tokenizer, scene_folder: Path, tmp_path: Path
) -> None:
    folder = language_model(tmp_path / "language", LlamaForCausalLM(LlamaConfig(**LANGUAGE)), plain_tokenizer)
    built = embed_language_model(folder, SIZES)
    Backbone(built.model, build_processor(built.tokenizer, SIZES)).save(tmp_path / "backbone")
    backbone = load_backbone(str(tmp_path / "backbone"), max_length=48)
    batch = render_items(backbone.processor, [Item("a dog", (scene_folder / "00000.png",)), Item(TEXTS[2] * 9)])
    ends = [ids[mask.bool()][-1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert ends == [built.tokenizer.convert_tokens_to_ids("</s>")] * 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("missing", "does not exist; give the folder"),
        ("family", r"is a 'gpt2' model; --language-model takes llama or qwen2\."),
        ("tokenizer", "cannot be loaded as a language model"),
        ("bias", r"does not fit into a Qwen2-VL \(.*o_proj\.bias"),
        ("heads", r"does not fit into a Qwen2-VL \(.*size mismatch"),
    ],
)
def test_a_language_model_that_cannot_be_built_on_is_refused(
    change: str, reason: str, plain_tokenizer: Qwen2Tokenizer, tmp_path: Path
) -> None:
    config = LlamaConfig(**LANGUAGE, attention_bias=change == "bias", head_dim=24 if change == "heads" else None)
    model: PreTrainedModel = LlamaForCausalLM(config)
    if change == "family":
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=400))
    if change != "missing":
        language_model(tmp_path / "language", model, None if change == "tokenizer" else plain_tokenizer)
    with pytest.raises(CocoaError, match=reason) as error:
        embed_language_model(tmp_path / "language", SIZES)
    assert "\n" not in str(error.value)
    assert error.type is (CocoaError if change in ("missing", "tokenizer") else UsageError)
