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
from exported import PROMPTS, TRAINING, contents, write_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny_backbones import TINY_MAX_LENGTH

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
def checkpoint(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    return write_checkpoint(backbone, tmp_path_factory.mktemp("run") / "contrastive")


@pytest.fixture(scope="module")
def tiny_export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(checkpoint, tmp_path_factory.mktemp("export") / "cocoa-qwen2vl")


@pytest.fixture(scope="module")
def model(tiny_export: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_export), device="cpu")


@pytest.fixture(scope="module")
def images(scene_rows: list[Row]) -> list[Image.Image]:
    return [load_image(row.image) for row in scene_rows[:4] if row.image is not None]


PLAIN = """
import json, sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cocoa_embed", "train", "integrations"):
            raise ModuleNotFoundError(f"{name} is not here", name=name)

sys.meta_path.insert(0, Refuse())
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("cocoa-qwen2vl", device="cpu")
image = Image.open("scene.png")
items = [{"text": "a red ring"}, {"image": image}, {"image": image, "text": "a red ring"}]
np.savez(
    "embeddings.npz",
    plain=model.encode(items),
    one_by_one=np.concatenate([model.encode([item]) for item in items]),
    bare=model.encode(["a red ring", image, items[2]]),
    query=model.encode_query(items),
    document=model.encode_document(items),
)
print(json.dumps({
    "modules": [type(module).__module__.split(".")[0] + "." + type(module).__name__ for module in model],
    "project": [name for name in sys.modules if name.split(".")[0] == "cocoa_embed"],
    "similarity": model.similarity_fn_name,
}))
"""


def test_plain_sentence_transformers_loads_it_without_this_project_and_gives_the_same_embeddings(
    tiny_export: Path, model: SentenceTransformer, images: list[Image.Image], scene_rows: list[Row], tmp_path: Path
) -> None:
    assert not list(tiny_export.rglob("*.py"))
    assert "auto_map" not in (tiny_export / "config.json").read_text()
    shutil.copytree(tiny_export, tmp_path / "cocoa-qwen2vl")
    shutil.copy(str(scene_rows[0].image), tmp_path / "scene.png")
    command = [sys.executable, "-W", "ignore", "-c", PLAIN]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "modules": [f"sentence_transformers.{name}" for name in ("Transformer", "Pooling", "Normalize")],
        "project": [],
        "similarity": "cosine",
    }
    embeddings = np.load(tmp_path / "embeddings.npz")
    items = [{"text": "a red ring"}, {"image": images[0]}, {"image": images[0], "text": "a red ring"}]
    for name in ("plain", "one_by_one", "bare"):
        np.testing.assert_allclose(embeddings[name], model.encode(items), **SAME)
    for name in ("query", "document"):
        np.testing.assert_allclose(embeddings[name], model.encode(items, prompt=PROMPTS[name]), **SAME)
        assert np.abs(embeddings[name] - embeddings["plain"]).max() > 1e-3


def test_an_embedding_is_the_normalised_last_hidden_state_at_eos(
    model: SentenceTransformer, checkpoint: Path, scene_rows: list[Row]
) -> None:
    """Computed from the checkpoint by the training code, one item at a time."""
    backbone = load_backbone(str(checkpoint))
    backbone.model.eval()
    items = [
        Item(text="a red ring"),
        Item(text=LONG_TEXT),
        Item(images=(scene_rows[0].image,)),
        Item(images=(scene_rows[1].image,), text="what is left of the ring?"),
    ]
    expected = []
    for item in items:
        batch = render_items(backbone.processor, [item])
        eos = (batch["input_ids"][0] == backbone.processor.tokenizer.eos_token_id).nonzero().flatten()
        assert eos.tolist() == [batch["input_ids"].shape[1] - 1]
        with torch.no_grad():
            hidden_states = backbone.model.base_model(**batch).last_hidden_state
        expected.append(torch.nn.functional.normalize(hidden_states[0, eos[0]], dim=0).numpy())
    embeddings = model.encode([as_input(item) for item in items])
    np.testing.assert_allclose(embeddings, np.stack(expected), **SAME)


def as_input(item: Item) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if item.image is not None:
        given["image"] = load_image(item.image)
    if item.text is not None:
        given["text"] = item.text
    return given


def test_saved_again_it_has_the_same_files_and_embeddings(tiny_export: Path, tmp_path: Path) -> None:
    """Without ``cocoa_training.json``: sentence-transformers copies the files that it knows, and the card."""
    first = SentenceTransformer(str(tiny_export), device="cpu")
    first.save(str(tmp_path / "second"))
    second = SentenceTransformer(str(tmp_path / "second"), device="cpu")
    original = contents(tiny_export)
    assert {"model.safetensors", "modules.json", "README.md", "chat_template.jinja"} <= original.keys()
    del original[TRAINING_FILE]
    assert contents(tmp_path / "second") == original
    items = [{"text": "a red ring"}]
    assert np.array_equal(first.encode(items), second.encode(items))


def test_a_causal_model_is_not_exported(tiny_backbone_path: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "causal"
    shutil.copytree(tiny_backbone_path, checkpoint)
    assert "is_causal" not in (checkpoint / "config.json").read_text()
    with pytest.raises(CocoaError, match="is causal"):
        build_sentence_transformer(checkpoint, prompts=PROMPTS)


def damage(file: Path, kind: str) -> None:
    """Cut a file of weights in half, or make all weights NaN."""
    if kind == "truncated":
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    else:
        weights = {name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("kind", "reason"), [("truncated", "the checkpoint is incomplete"), ("NaN", "not finite")])
def test_damaged_weights_are_refused_in_one_line(checkpoint: Path, tmp_path: Path, kind: str, reason: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    damage(broken / "model.safetensors", kind)
    with pytest.raises(CocoaError, match=reason) as error:
        export_model(broken, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_export_never_replaces_a_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint looks like an earlier export."""
    for stage in ("bridge", "contrastive"):
        shutil.copytree(checkpoint, tmp_path / "run" / stage)
    before = contents(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    stage = Path("contrastive").absolute()
    for out in (stage, Path("contrastive"), stage / ".." / "contrastive", stage.parent):
        with pytest.raises(CocoaError, match="is or holds the checkpoint"):
            export_model(stage, out)
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / RUN_MARKER).touch()
    for out in ("bridge", "bridge/model", "contrastive/model"):
        with pytest.raises(CocoaError, match=f"{out} is in the folder of a training run"):
            export_model(stage, stage.parent / out)
    assert contents(tmp_path / "run") == {**before, RUN_MARKER: b""}


def split_card(card: str) -> tuple[dict[str, Any], str]:
    _, front_matter, body = card.split("---\n", maxsplit=2)
    return yaml.safe_load(front_matter), body


def table_rows(body: str, first_cell: str) -> list[str]:
    rows = [line for line in body.splitlines() if line.startswith(f"| {first_cell} |")]
    return [cell.strip() for cell in rows[0].strip("|").split("|")] if rows else []


def test_the_card_describes_the_model_and_its_training(tiny_export: Path) -> None:
    front_matter, body = split_card((tiny_export / "README.md").read_text())
    assert front_matter["library_name"] == "sentence-transformers"
    for part in (
        *("a-tiny-backbone", "32 dimensions", f'"{PROMPTS["query"]}"', f'"{PROMPTS["document"]}"', "12544 pixels"),
        *(f"{TINY_MAX_LENGTH} tokens", "Seed 17", 'SentenceTransformer("cocoa-qwen2vl")', "Nothing was measured"),
    ):
        assert part in body
    assert table_rows(body, "warmup") == ["warmup", "11", "4", "0.0003", "1.234"]
    assert table_rows(body, "contrastive") == ["contrastive", "13", "8", "0.0005", "0.567"]
    assert not table_rows(body, "bridge"), "that stage was not run"


def test_the_card_shows_results_and_data(model: SentenceTransformer, tmp_path: Path) -> None:
    metrics = {"recall@1": 0.875, "recall@5": 0.95, "recall@10": 1.0, "mrr": 0.9014}
    training = {**TRAINING, "data": "8000 drawn scenes", "results": {"text to image, 500 scenes": metrics}}
    save_sentence_transformer(model, tmp_path / "out", training)
    _, body = split_card((tmp_path / "out" / "README.md").read_text())
    assert table_rows(body, "text to image, 500 scenes")[1:] == ["0.875", "0.950", "1.000", "0.901"]
    assert "8000 drawn scenes" in body
    assert "Nothing was measured" not in body
    assert json.loads((tmp_path / "out" / TRAINING_FILE).read_text()) == training


def card_body(model: SentenceTransformer, **contrastive: Any) -> str:
    """Return the card of a model whose contrastive stage has these values in its record."""
    stages = [TRAINING["stages"][0], {**TRAINING["stages"][1], **contrastive}]
    return " ".join(split_card(model_card("my-model", model, {**TRAINING, "stages": stages}))[1].split())


def test_the_card_describes_stages_adapters_and_empty_prompts(model: SentenceTransformer) -> None:
    assert "Adapters" not in card_body(model)
    body = card_body(model, adapter={"kind": "dora", "r": 4, "alpha": 64}, description="With InfoNCE.")
    assert "merged into the weights at the end of their stage: contrastive DoRA (r 4, alpha 64). With InfoNCE." in body
    recipe = {**TRAINING["recipe"], "prompts": {"query": "", "document": ""}}
    bare = model_card("bare", model, {**TRAINING, "recipe": recipe, "stages": []})
    assert "No stage was run" in bare
    assert "`encode_query` puts nothing before a query" in bare


def test_the_cards_instructions_for_shorter_embeddings_work(model: SentenceTransformer, tiny_export: Path) -> None:
    assert "truncate_dim" not in card_body(model, matryoshka_dims=None)
    assert "truncate_dim" not in card_body(model, matryoshka_dims=[32])
    body = card_body(model, matryoshka_dims=[8, 32, 16])
    assert "The first 16 or 8 values of an embedding" in body
    assert 'SentenceTransformer("my-model", truncate_dim=16)' in body
    assert "`normalize_embeddings=True`" in body
    short = SentenceTransformer(str(tiny_export), device="cpu", truncate_dim=16)
    embeddings = short.encode([{"text": "a red ring"}], normalize_embeddings=True)
    expected = model.encode([{"text": "a red ring"}])[:, :16]
    np.testing.assert_allclose(embeddings, expected / np.linalg.norm(expected, axis=1, keepdims=True), **SAME)


@pytest.mark.parametrize("backbone", ["Qwen/Qwen2-VL-2B-Instruct", "./my: models/#1", "[a] & *b", "007"])
def test_the_cards_front_matter_holds_a_hub_backbone_of_any_name_or_the_built_in_licence(
    model: SentenceTransformer, backbone: str
) -> None:
    def front_matter(origin: str) -> dict[str, Any]:
        return split_card(model_card("model", model, {**TRAINING, "backbone": backbone, "origin": origin}))[0]

    assert front_matter("hub")["base_model"] == backbone
    assert front_matter("built-in")["license"] == "apache-2.0"
    assert not front_matter("folder").keys() & {"base_model", "license"}, "its source and licence are unknown"


def test_the_cards_code_runs(
    tiny_export: Path, scene_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, body = split_card((tiny_export / "README.md").read_text())
    (code,) = re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
    shutil.copytree(tiny_export, tmp_path / "cocoa-qwen2vl")
    with Image.open(str(scene_rows[0].image)) as image:
        image.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    printed: list[Any] = []
    exec(code, {"print": printed.append}, names)
    assert printed[0].shape == (1, 3)
