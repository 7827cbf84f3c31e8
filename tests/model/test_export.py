import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from exported import PROMPTS, TRAINING, contents
from sentence_transformers import SentenceTransformer
from tiny_backbones import TINY_MAX_LENGTH
from torch.nn.functional import normalize

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import RUN_MARKER
from cocoa_embed.images.load import load_image
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.card import model_card
from cocoa_embed.model.export import build_sentence_transformer, export_model, save_sentence_transformer
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.train.stages.rendering import render_items

LONG_TEXT = "large red circle at top left and small blue ring at bottom right on white " * 40
SAME = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(tiny_export: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_export), device="cpu")


WITHOUT_PROJECT = "import sys; sys.modules.update(dict.fromkeys(('cocoa_embed', 'train', 'integrations')))\n"
"""Whoever imports one of these gets a ``ModuleNotFoundError``."""

EMBED = """
import numpy as np
image = Image.open("photo.jpg")
items = [{"text": "a red ring"}, {"image": image}, {"image": image, "text": "a red ring"}]
np.savez(
    "embeddings.npz",
    plain=model.encode(items),
    bare=model.encode(["a red ring", image, items[2]]),
    query=model.encode_query(items),
    document=model.encode_document(items),
    similarity=model.similarity(queries, documents),
)
"""


def test_the_cards_code_runs_without_this_project_and_gives_the_same_embeddings(
    tiny_export: Path, model: SentenceTransformer, scene_rows: list[Row], tmp_path: Path
) -> None:
    assert not list(tiny_export.rglob("*.py"))
    assert "auto_map" not in (tiny_export / "config.json").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", (tiny_export / "README.md").read_text(), flags=re.DOTALL)
    shutil.copytree(tiny_export, tmp_path / "cocoa-qwen2vl")
    shutil.copy(str(scene_rows[0].image), tmp_path / "photo.jpg")
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_PROJECT + code + EMBED]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "embeddings.npz")
    image = load_image(tmp_path / "photo.jpg")
    items = [{"text": "a red ring"}, {"image": image}, {"image": image, "text": "a red ring"}]
    for name in ("plain", "bare"):
        np.testing.assert_allclose(found[name], model.encode(items), **SAME)
    for name in ("query", "document"):
        np.testing.assert_allclose(found[name], model.encode(items, prompt=PROMPTS[name]), **SAME)
        assert np.abs(found[name] - found["plain"]).max() > 1e-3


def test_special_tokens_that_a_text_mentions_are_its_characters_alone_and_in_a_batch(
    model: SentenceTransformer, scene_rows: list[Row]
) -> None:
    image = load_image(str(scene_rows[0].image))
    texts = ["red <|image_pad|> ring", "<|endoftext|>", "<|vision_start|><|mask|>", "<|video_pad|>", "red ring", "<|"]
    items = [{"text": texts[0], "image": image}, {"image": image}, *({"text": text} for text in texts)]
    together = model.encode(items)
    np.testing.assert_allclose(together, np.concatenate([model.encode([item]) for item in items]), **SAME)
    np.testing.assert_allclose(together[2:], model.encode(texts), **SAME)
    np.testing.assert_allclose(model.encode("ring", prompt=texts[0] + " "), model.encode(texts[0] + " ring"), **SAME)
    distances = np.abs(together[:, None] - together).max(axis=-1)
    assert distances[~np.eye(len(items), dtype=bool)].min() > 1e-3


@torch.no_grad()
def hidden_states(checkpoint: Path, items: list[Item], prompt: str = "") -> list[torch.Tensor]:
    """Return the last hidden states of items ``[L, D]``, which end in ``<EOS>``, by the training code, one by one."""
    backbone = load_backbone(str(checkpoint))
    model, eos = backbone.model.eval(), backbone.processor.tokenizer.eos_token_id
    batches = [render_items(backbone.processor, [item], prompt=prompt) for item in items]
    for batch in batches:
        assert (batch["input_ids"][0] == eos).nonzero().flatten().tolist() == [batch["input_ids"].shape[1] - 1]
    return [model.base_model(**batch).last_hidden_state[0] for batch in batches]


def test_an_embedding_is_the_normalised_last_hidden_state_at_eos(
    model: SentenceTransformer, checkpoint: Path, scene_rows: list[Row]
) -> None:
    items = [Item(text=LONG_TEXT), Item(images=(scene_rows[1].image,), text="what is left of the ring?")]
    expected = normalize(torch.stack([states[-1] for states in hidden_states(checkpoint, items)])).numpy()
    np.testing.assert_allclose(model.encode([item.load() for item in items]), expected, **SAME)


def test_a_mean_pooled_embedding_is_the_normalised_mean_over_all_tokens_without_padding(
    checkpoint: Path, scene_rows: list[Row], tmp_path: Path
) -> None:
    """Visual tokens, prompt and ``<EOS>`` count."""
    mean = Path(shutil.copytree(checkpoint, tmp_path / "mean"))
    training = {**TRAINING, "recipe": {**TRAINING["recipe"], "pooling": "mean"}}
    (mean / TRAINING_FILE).write_text(json.dumps(training), encoding="utf-8")
    exported = SentenceTransformer(str(export_model(mean, tmp_path / "exported")), device="cpu")
    items = [Item(text="a red ring"), Item(images=(scene_rows[1].image,), text="what is left of the ring?")]
    states = hidden_states(checkpoint, items, prompt=PROMPTS["query"])
    expected = normalize(torch.stack([each.mean(dim=0) for each in states])).numpy()
    loaded = [item.load() for item in items]
    np.testing.assert_allclose(exported.encode_query(loaded), expected, **SAME)
    with_eos = build_sentence_transformer(checkpoint, prompts=PROMPTS, device="cpu")
    assert np.abs(with_eos.encode_query(loaded) - expected).max() > 1e-2


def test_exporting_again_gives_the_same_files_and_embeddings(
    tiny_export: Path, model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card names the folder, also if it is the working directory."""
    assert (tiny_export / "README.md").read_text() == model_card("cocoa-qwen2vl", model, TRAINING)
    (tmp_path / "cocoa-qwen2vl").mkdir()
    monkeypatch.chdir(tmp_path / "cocoa-qwen2vl")
    second = save_sentence_transformer(model, Path(), TRAINING)
    assert contents(second) == contents(tiny_export)
    assert json.loads((second / TRAINING_FILE).read_text()) == TRAINING
    loaded = SentenceTransformer(str(second), device="cpu")
    assert np.array_equal(model.encode("a red ring"), loaded.encode("a red ring"))


def test_a_causal_model_is_not_exported(tiny_backbone_path: Path) -> None:
    with pytest.raises(CocoaError, match="is causal"):
        build_sentence_transformer(tiny_backbone_path, prompts=PROMPTS)


def test_damaged_weights_are_refused_in_one_line_and_nothing_is_written(checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    os.truncate(broken / "model.safetensors", 1000)
    with pytest.raises(CocoaError, match="checkpoint is incomplete") as error:
        export_model(broken, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_export_never_replaces_a_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint looks like an earlier export."""
    shutil.copytree(checkpoint, tmp_path / "run" / "contrastive")
    before = contents(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    stage = Path("contrastive").absolute()
    for out in (Path("contrastive"), stage.parent):
        with pytest.raises(CocoaError, match="is or holds the checkpoint"):
            export_model(stage, out)
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / RUN_MARKER).touch()
    for out in ("bridge", "contrastive/model"):
        with pytest.raises(CocoaError, match=f"{out} is in the folder of a training run"):
            export_model(stage, stage.parent / out)
    assert contents(tmp_path / "run") == {**before, RUN_MARKER: b""}


def card(model: SentenceTransformer, **changes: Any) -> tuple[dict[str, Any], str]:
    """Return the front matter and, in one line, the body of the card of a model with changes in its record."""
    _, front_matter, body = model_card("my-model", model, {**TRAINING, **changes}).split("---\n", maxsplit=2)
    return yaml.safe_load(front_matter), " ".join(body.split())


@pytest.mark.parametrize(
    ("changes", "contrastive", "shown", "absent"),
    [
        (
            {},
            {},
            [
                *("a-tiny-backbone", "32 dimensions", f'"{PROMPTS["query"]}"', f'"{PROMPTS["document"]}"'),
                *(f"{TINY_MAX_LENGTH} tokens", "12544 pixels", "Seed 17", 'SentenceTransformer("my-model")'),
                *("| warmup | 11 | 4 | 0.0003 | 1.234 |", "| contrastive | 13 | 8 | 0.0005 | 0.567 |"),
            ],
            ["| bridge |", "Adapters", "truncate_dim"],
        ),
        (
            {"results": {"all": {"recall@1": 0.875, "recall@5": 0.95, "recall@10": 1.0, "mrr": 0.9014}}},
            {"adapter": {"kind": "dora", "r": 4, "alpha": 64}, "description": "With InfoNCE."},
            ["| all | 0.875 | 0.950 | 1.000 | 0.901 |", "stage: contrastive dora (r 4, alpha 64). With InfoNCE."],
            ["Nothing was measured"],
        ),
        (
            {"recipe": {**TRAINING["recipe"], "prompts": {"query": "", "document": ""}}},
            {"matryoshka_dims": [8, 32, 16]},
            ["puts nothing before a query", "first 16 or 8 values", 'SentenceTransformer("my-model", truncate_dim=16)'],
            [],
        ),
    ],
)
def test_the_card_describes_the_model_its_training_and_its_results(
    model: SentenceTransformer,
    changes: dict[str, Any],
    contrastive: dict[str, Any],
    shown: list[str],
    absent: list[str],
) -> None:
    stages = [TRAINING["stages"][0], {**TRAINING["stages"][1], **contrastive}]
    _, body = card(model, stages=stages, **changes)
    assert [part for part in shown if part not in body] == [part for part in absent if part in body] == []
    assert "No stage was run" in card(model, stages=[])[1]


@pytest.mark.parametrize("backbone", ["Qwen/Qwen2-VL-2B-Instruct", "./my: models/#1"])
def test_the_cards_front_matter_holds_a_hub_backbone_of_any_name_or_the_built_in_licence(
    model: SentenceTransformer, backbone: str
) -> None:
    origins = ("hub", "built-in", "folder")
    hub, built_in, folder = (card(model, backbone=backbone, origin=origin)[0] for origin in origins)
    assert (hub["base_model"], built_in["license"]) == (backbone, "apache-2.0")
    assert not folder.keys() & {"base_model", "license"}, "its source and licence are unknown"
