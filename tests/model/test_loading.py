import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exported import PROMPTS, TRAINING, write_checkpoint
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model import export, template
from cocoa_embed.model.attention import is_causal
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.model.loading import check_model, is_hub_name, load_model, side_by_side


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_name_is_a_hub_name_only_if_it_cannot_be_a_folder() -> None:
    assert is_hub_name("sentence-transformers/clip-ViT-B-32")
    Path("models").mkdir()
    for name in ("cocoa-qwen2vl", "./a/b", "../a", "/abs/path", "~/m", "a/b/c", "a/", "/a", "models/mine", "a\\b/c"):
        assert not is_hub_name(name), name


@pytest.mark.parametrize("bidirectional", [True, False])
def test_an_export_and_a_checkpoint_of_any_stage_load_with_prompts_and_attention_as_trained(
    tiny_backbone_path: Path, bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRAINING["recipe"], "bidirectional", bidirectional)
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, bidirectional=bidirectional)
    checkpoint = write_checkpoint(backbone, Path("run") / "warmup")
    vectors = []
    for folder in (checkpoint, export_model(checkpoint, Path("model"))):
        encoder = load_encoder(folder, "cpu", dimension=16)
        assert (encoder.name, encoder.dimension, encoder.model.prompts) == (str(folder), 16, PROMPTS)
        assert is_causal(encoder.model[0].auto_model) is not bidirectional
        vectors.append(encoder.embed_queries([{"text": "a red ring"}]))
    assert (vectors[0] == vectors[1]).all()


def test_weights_load_as_the_type_that_is_asked_for(tiny_backbone_path: Path) -> None:
    checkpoint = write_checkpoint(load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH), Path("run") / "c")
    for folder in (checkpoint, export_model(checkpoint, Path("model"))):
        for dtype in (None, "float32", "bfloat16"):
            weights = load_model(folder, "cpu", dtype=dtype).state_dict().values()
            assert {str(weight.dtype).removeprefix("torch.") for weight in weights} == {dtype or "float32"}
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        load_model(checkpoint, dtype="int8")
    with pytest.raises(UsageError, match=r"--revision main needs a model on the hub, but .* is a folder"):
        load_model(checkpoint, revision="main")


def test_a_model_of_several_vectors_stays_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second GPU, which this machine need not have."""
    monkeypatch.setattr(template, "eos_tokens", lambda tokenizer: ["a", "b"])
    monkeypatch.setattr(export, "embedding_model", lambda *arguments: arguments[3:])

    class OnSecond(list[None]):
        tokenizer, prompts, device = SimpleNamespace(), {}, torch.device("cuda:1")

    model: Any = OnSecond([None])
    assert side_by_side(model) == ("cuda:1", 2)


def test_a_folder_that_is_no_model_is_refused_with_a_reason() -> None:
    Path("good/0").mkdir(parents=True)
    Path("good/modules.json").write_text("[]")
    with pytest.raises(CocoaError, match="good has no weights"):
        check_model("good")
    Path("good/0/model-00001-of-00002.safetensors").touch()
    check_model("good")
    with pytest.raises(CocoaError, match="cannot be loaded as a SentenceTransformer"):
        load_model("good")
    Path("words").mkdir()
    with pytest.raises(CocoaError, match="words is not a checkpoint"):
        check_model("words")


def test_a_missing_folder_is_refused_before_a_heavy_library_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(CocoaError, match=r"^nowhere: there is no such model folder"):
        load_encoder("nowhere")
