import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from exported import contents
from PIL import Image
from safetensors import safe_open
from scene_captions import parse_caption
from tiny_backbones import qwen2_vl
from transformers import Qwen2Tokenizer, Qwen2VLProcessor

from cocoa_embed.demo import captioner
from cocoa_embed.demo.captioner import (
    QWEN_SPECIAL_TOKENS,
    CaptionCollator,
    CaptionedScenes,
    build_model,
    build_processor,
    build_tokenizer,
    pretrain,
)
from cocoa_embed.demo.scenes import captions, split_of
from cocoa_embed.model.backbone import load_backbone, resolve_backbone


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer(0)


@pytest.fixture(scope="module")
def processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    return build_processor(tokenizer)


def first_rows(seed: int, count: int) -> list[dict[str, object]]:
    return list(islice(CaptionedScenes(seed), count))


def comparable(rows: list[dict[str, object]]) -> list[tuple[object, bytes]]:
    return [(row["text"], row["image"].tobytes()) for row in rows if isinstance(row["image"], Image.Image)]


def test_captioned_scenes_are_deterministic_and_each_pass_begins_anew() -> None:
    stream = CaptionedScenes(3)
    first, again = (comparable(list(islice(stream, 20))) for _ in range(2))
    assert len(first) == 20
    assert first == again == comparable(first_rows(3, 20))
    assert first != comparable(first_rows(4, 20))


def test_captioned_scenes_are_of_the_train_split_in_every_wording() -> None:
    texts = [str(row["text"]) for row in first_rows(0, 300)]
    scenes = [parse_caption(text) for text in texts]
    assert {split_of(scene) for scene in scenes} == {"train"}
    assert {captions(scene).index(text) for scene, text in zip(scenes, texts, strict=True)} == {0, 1, 2, 3}


def test_the_tokenizer_is_trained_on_training_scenes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = []
    sampler = captioner.distinct_scenes

    def recording(generator: object, split: str) -> Iterator[object]:
        splits.append(split)
        return sampler(generator, split)

    monkeypatch.setattr(captioner, "distinct_scenes", recording)
    monkeypatch.setattr(captioner, "CAPTIONS_FOR_TOKENIZER", 50)
    build_tokenizer(0)
    assert splits == ["train"]


def test_the_tokenizer_is_deterministic_and_names_its_special_tokens_as_qwen_does(tokenizer: Qwen2Tokenizer) -> None:
    assert build_tokenizer(0).get_vocab() == tokenizer.get_vocab()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in QWEN_SPECIAL_TOKENS:
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def test_the_tokenizer_knows_words_and_loses_nothing(tokenizer: Qwen2Tokenizer) -> None:
    for row in first_rows(1, 50):
        ids = tokenizer(row["text"])["input_ids"]
        assert tokenizer.decode(ids) == row["text"]
        assert len(ids) <= 1.5 * len(str(row["text"]).split()) + 8, "a word is about one token"
    stranger = "Über 12 Straßen – 日本"
    assert tokenizer.decode(tokenizer(stranger)["input_ids"]) == stranger


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_the_labels_are_the_caption_and_eos_alone(tokenizer: Qwen2Tokenizer, padding_side: str) -> None:
    processor = build_processor(build_tokenizer(0))
    processor.tokenizer.padding_side = padding_side
    rows = sorted(first_rows(0, 6), key=lambda row: len(str(row["text"])))
    batch = CaptionCollator(processor)(rows)
    assert (batch["attention_mask"] == 0).any(), "the batch is padded"
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        expected = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        where = (labels != -100).nonzero().flatten()
        assert labels[where].tolist() == expected
        assert torch.equal(ids[where], labels[where])
        assert where.tolist() == list(range(int(where[0]), int(where[0]) + len(expected)))


def test_a_batch_of_the_collator_is_what_the_model_takes(processor: Qwen2VLProcessor) -> None:
    rows = first_rows(0, 3)
    batch = CaptionCollator(processor)(rows)
    assert len(batch["image_grid_thw"]) == 3
    torch.manual_seed(0)
    model, _ = qwen2_vl(processor.tokenizer)
    loss = model(**batch).loss
    assert loss > 0
    assert torch.isfinite(loss)


def test_the_captioner_has_two_to_four_million_parameters(tokenizer: Qwen2Tokenizer) -> None:
    model = build_model(tokenizer)
    assert 2_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    assert model.get_input_embeddings().num_embeddings > len(tokenizer), "there is room for a mask token"


@pytest.fixture
def small_captioner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioner, "build_model", lambda tokenizer: qwen2_vl(tokenizer)[0])


@pytest.mark.usefixtures("small_captioner")
def test_pretraining_writes_a_folder_that_is_a_backbone(tmp_path: Path) -> None:
    pretrain(tmp_path / "captioner", steps=3, batch_size=4, learning_rate=1e-2, seed=0)
    with safe_open(tmp_path / "captioner" / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}
    backbone = load_backbone(str(tmp_path / "captioner"), max_length=64)
    assert backbone.model.dtype == torch.float32
    batch = CaptionCollator(backbone.processor)(first_rows(0, 2))
    assert torch.isfinite(backbone.model(**batch).loss)


@pytest.mark.usefixtures("small_captioner")
def test_pretraining_is_deterministic_by_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain(tmp_path / name, steps=2, batch_size=2, learning_rate=1e-2, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first["model.safetensors"] == again["model.safetensors"]
    assert first["tokenizer.json"] == again["tokenizer.json"]
    assert first["model.safetensors"] != other["model.safetensors"]


@pytest.mark.usefixtures("small_captioner")
def test_pretraining_changes_weights_as_far_as_it_is_told(tmp_path: Path) -> None:
    losses = []
    for name, steps in (("short", 1), ("long", 40)):
        pretrain(tmp_path / name, steps=steps, batch_size=8, learning_rate=1e-2, seed=0)
        backbone = load_backbone(str(tmp_path / name), max_length=64)
        backbone.model.config.get_text_config().is_causal = True
        with torch.no_grad():
            losses.append(backbone.model(**CaptionCollator(backbone.processor)(first_rows(9, 16))).loss.item())
    assert losses[1] < losses[0] - 1


def test_the_shipped_processor_is_the_one_that_the_command_writes(tmp_path: Path) -> None:
    build_processor(build_tokenizer(0)).save_pretrained(tmp_path)
    shipped = Path(resolve_backbone("scene-captioner"))
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer_config.json"):
        assert (shipped / name).read_bytes() == (tmp_path / name).read_bytes(), name
    written, ours = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, shipped))
    assert {**written, "padding": None} == {**ours, "padding": None}, "padding is the trace of the last batch"
