import json
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from tiny_backbones import qwen2_vl
from transformers import Qwen2Tokenizer

from cocoa_embed.demo import captioner
from cocoa_embed.demo.captioner import (
    QWEN_SPECIAL_TOKENS,
    CaptionCollator,
    CaptionedScenes,
    build_processor,
    build_tokenizer,
    pretrain,
)
from cocoa_embed.demo.scenes import captions, sample_scene, split_of
from cocoa_embed.model.backbone import load_backbone, resolve_backbone


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer(0)


def first_rows(seed: int, count: int) -> list[dict[str, Any]]:
    return list(islice(CaptionedScenes(seed), count))


def test_the_stream_holds_training_scenes_alone_the_same_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(captioner, "sample_scene", lambda *split: drawn.append(sample_scene(*split)) or drawn[-1])
    stream = CaptionedScenes(3)
    first, again, other = (
        [(row["text"], row["image"].tobytes()) for row in islice(each, 50)]
        for each in (stream, stream, CaptionedScenes(4))
    )
    assert first == again != other
    assert {split_of(scene) for scene in drawn} == {"train"}
    assert {captions(scene).index(text) for scene, (text, _) in zip(drawn, first, strict=False)} == {0, 1, 2, 3}


def test_the_tokenizer_sees_training_scenes_alone_and_is_lossless(
    tokenizer: Qwen2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Mock(side_effect=captioner.distinct_scenes)
    monkeypatch.setattr(captioner, "distinct_scenes", drawn)
    assert build_tokenizer(0).get_vocab() == tokenizer.get_vocab()
    assert [call.args[1] for call in drawn.call_args_list] == ["train"]
    for text in (*QWEN_SPECIAL_TOKENS, *(row["text"] for row in first_rows(1, 50)), "Über 12 Straßen – 日本"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_labels_are_the_caption_and_eos_alone(tokenizer: Qwen2Tokenizer) -> None:
    rows = first_rows(0, 6)
    batch = CaptionCollator(build_processor(copy(tokenizer)))(rows)
    assert (batch["attention_mask"] == 0).any(), "the batch is padded"
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        expected = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        where = (labels != -100).nonzero().flatten()
        assert labels[where].tolist() == expected
        assert torch.equal(ids[where], labels[where])


def test_pretraining_is_deterministic_lowers_the_loss_and_writes_a_backbone(
    tokenizer: Qwen2Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioner, "build_model", lambda tokenizer: qwen2_vl(tokenizer)[0])
    monkeypatch.setattr(captioner, "build_tokenizer", lambda seed: tokenizer)
    losses = []
    for name, seed, steps in (("a", 1, 1), ("b", 1, 1), ("long", 1, 25)):
        pretrain(tmp_path / name, seed, steps=steps, batch_size=4, learning_rate=2e-2)
        backbone = load_backbone(str(tmp_path / name), max_length=64)
        backbone.model.config.get_text_config().is_causal = True
        with torch.no_grad():
            losses.append(backbone.model(**CaptionCollator(backbone.processor)(first_rows(9, 16))).loss.item())
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == again
    assert losses[2] < losses[0] - 0.5
    with safe_open(tmp_path / "a" / "model.safetensors", framework="pt") as saved:
        assert {saved.get_tensor(name).dtype for name in saved.keys()} == {torch.bfloat16}


def test_the_shipped_processor_is_the_one_that_the_command_writes(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    build_processor(copy(tokenizer)).save_pretrained(tmp_path)
    shipped = Path(resolve_backbone("scene-captioner"))
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer_config.json"):
        assert (shipped / name).read_bytes() == (tmp_path / name).read_bytes(), name
    written, ours = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, shipped))
    assert {**written, "padding": None} == {**ours, "padding": None}, "padding is that of the last batch"
