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
from stages import alone

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import RUN_MARKER
from cocoa_embed.images.load import load_image
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.model.card import model_card
from cocoa_embed.model.export import build_sentence_transformer, export_model, save_sentence_transformer
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.rendering import render_items
from conftest import TINY_MAX_LENGTH

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


@pytest.fixture(scope="module")
def inputs(images: list[Image.Image]) -> list[dict[str, Any]]:
    """Texts, images and both, of different lengths and sizes."""
    wide = images[3].resize((112, 84))
    return [
        {"text": "a red ring"},
        {"image": images[0]},
        {"text": "small blue star at top left and large green cross at bottom right on white"},
        {"image": images[1], "text": "what is left of the ring?"},
        {"image": wide},
        {"image": wide, "text": "on black"},
    ]


# Without this project

PLAIN = """
import json, sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cocoa_embed", "train", "integrations"):
            raise ModuleNotFoundError(f"{name} is not here", name=name)

sys.meta_path.insert(0, Refuse())
try:
    import cocoa_embed
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the premise fails: the project can be imported")

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("cocoa-qwen2vl", device="cpu")
image = Image.open("scene.png")
items = [{"text": "a red ring"}, {"image": image}, {"image": image, "text": "a red ring"}]
mixed = ["a red ring", image, items[2]]
np.savez(
    "embeddings.npz",
    together=model.encode(items),
    one_by_one=np.concatenate([model.encode([item]) for item in items]),
    mixed=model.encode(mixed),
    query=model.encode_query(items),
    document=model.encode_document(items),
)
facts = {
    "modules": [type(module).__module__ + "." + type(module).__name__ for module in model],
    "project": [name for name in sys.modules if name.split(".")[0] == "cocoa_embed"],
    "prompts": model.prompts,
    "similarity": model.similarity_fn_name,
}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def elsewhere(
    tiny_export: Path, scene_rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a process without this project makes of the export: facts, and embeddings by name."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(tiny_export, folder / "cocoa-qwen2vl")
    shutil.copy(str(scene_rows[0].image), folder / "scene.png")
    (folder / "plain.py").write_text(PLAIN)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "plain.py"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "embeddings.npz") as arrays:
        return json.loads(done.stdout.splitlines()[-1]), dict(arrays)


def test_plain_sentence_transformers_loads_it_by_its_folders_name(
    elsewhere: tuple[dict[str, Any], dict[str, np.ndarray]],
) -> None:
    facts, _ = elsewhere
    assert facts["project"] == []
    assert [name.split(".")[0] for name in facts["modules"]] == ["sentence_transformers"] * 3
    assert [name.split(".")[-1] for name in facts["modules"]] == ["Transformer", "Pooling", "Normalize"]
    assert facts["prompts"] == PROMPTS
    assert facts["similarity"] == "cosine"


def test_plain_sentence_transformers_gives_the_same_embeddings(
    elsewhere: tuple[dict[str, Any], dict[str, np.ndarray]], model: SentenceTransformer, images: list[Image.Image]
) -> None:
    _, embeddings = elsewhere
    items = [{"text": "a red ring"}, {"image": images[0]}, {"image": images[0], "text": "a red ring"}]
    np.testing.assert_allclose(embeddings["together"], model.encode(items), **SAME)
    np.testing.assert_allclose(embeddings["one_by_one"], embeddings["together"], **SAME)
    np.testing.assert_allclose(embeddings["mixed"], embeddings["together"], **SAME)
    np.testing.assert_allclose(embeddings["query"], model.encode(items, prompt=PROMPTS["query"]), **SAME)
    np.testing.assert_allclose(embeddings["document"], model.encode(items, prompt=PROMPTS["document"]), **SAME)


def test_the_export_holds_no_code_and_asks_for_none(tiny_export: Path) -> None:
    assert not list(tiny_export.rglob("*.py"))
    assert "auto_map" not in (tiny_export / "config.json").read_text()
    types = [module["type"] for module in json.loads((tiny_export / "modules.json").read_text())]
    assert len(types) == 3
    assert all(name.startswith("sentence_transformers.") for name in types)


# What an embedding is


def test_an_embedding_is_the_normalised_last_hidden_state_at_eos(
    model: SentenceTransformer, checkpoint: Path, scene_rows: list[Row]
) -> None:
    """Computed from the checkpoint by the training code, one item at a time."""
    backbone = load_backbone(str(checkpoint))
    backbone.model.eval()
    items = [
        Item(text="a red ring"),
        Item(text=LONG_TEXT),
        Item(image=scene_rows[0].image),
        Item(image=scene_rows[1].image, text="what is left of the ring?"),
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


def test_a_long_text_ends_in_eos_and_what_was_cut_has_no_influence(
    model: SentenceTransformer, images: list[Image.Image]
) -> None:
    for extra in ({}, {"image": images[0]}):
        features = model[0].preprocess([{"text": LONG_TEXT, **extra}], prompt=PROMPTS["query"])
        ids = features["input_ids"][0]
        assert len(ids) == TINY_MAX_LENGTH
        assert ids[-1] == model.tokenizer.eos_token_id
        if extra:
            assert (ids == model[0].auto_model.config.image_token_id).sum() == 4
        long, longer = model.encode([{"text": LONG_TEXT, **extra}, {"text": f"{LONG_TEXT} and more", **extra}])
        np.testing.assert_allclose(long, longer, **SAME)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_bidirectional_after_loading(
    tiny_export: Path, model: SentenceTransformer, inputs: list[dict[str, Any]], implementation: str
) -> None:
    loaded = SentenceTransformer(str(tiny_export), device="cpu", model_kwargs={"attn_implementation": implementation})
    backbone = loaded[0].auto_model
    assert backbone.config._attn_implementation == implementation
    assert_bidirectional(backbone)
    np.testing.assert_allclose(loaded.encode(inputs), model.encode(inputs), **SAME)
    backbone.config.get_text_config().is_causal = True
    with pytest.raises(CocoaError):
        assert_bidirectional(backbone)


# Prompts


def test_queries_and_documents_get_their_stored_prompts(
    model: SentenceTransformer, inputs: list[dict[str, Any]]
) -> None:
    assert model.prompts == PROMPTS
    plain = model.encode(inputs)
    for encode, name in ((model.encode_query, "query"), (model.encode_document, "document")):
        prompted = encode(inputs)
        np.testing.assert_allclose(prompted, model.encode(inputs, prompt=PROMPTS[name]), **SAME)
        assert (np.abs(prompted - plain).max(axis=1) > 1e-3).all()
    assert (np.abs(model.encode_query(inputs) - model.encode_document(inputs)).max(axis=1) > 1e-3).all()


# The same tokens in training and in inference


@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize(
    ("text", "has_image"), [("a red ring", False), (None, True), ("on white, a\n{red} ring", True), (LONG_TEXT, True)]
)
def test_token_ids_and_pixels_are_those_of_training(
    model: SentenceTransformer,
    tiny_backbone: Backbone,
    scene_rows: list[Row],
    text: str | None,
    has_image: bool,
    with_prompt: bool,
) -> None:
    item = Item(text=text, image=scene_rows[0].image if has_image else None)
    prompt = PROMPTS["query"] if with_prompt else ""
    inference = model[0].preprocess([as_input(item)], prompt=prompt or None)
    prompted = Item(text=(prompt + (text or "")) or None, image=item.image)
    training = render_items(tiny_backbone.processor, [prompted])
    for key in training:
        assert torch.equal(inference[key], training[key]), key
    assert ("pixel_values" in inference) == has_image


# Saving again


def test_saved_again_it_is_the_same_files_and_embeddings(
    tiny_export: Path, inputs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Only ``cocoa_training.json`` stays behind: sentence-transformers copies what it knows, the card included."""
    first = SentenceTransformer(str(tiny_export), device="cpu")
    first.save(str(tmp_path / "second"))
    second = SentenceTransformer(str(tmp_path / "second"), device="cpu")
    second.save(str(tmp_path / "third"))
    original, once, twice = (contents(folder) for folder in (tiny_export, tmp_path / "second", tmp_path / "third"))
    assert {"model.safetensors", "modules.json", "README.md", "chat_template.jinja"} <= original.keys()
    del original[TRAINING_FILE]
    assert once.keys() == original.keys()
    assert [name for name in original if once[name] != original[name]] == []
    assert twice == once
    assert np.array_equal(first.encode(inputs), second.encode(inputs))


def test_a_causal_model_is_not_exported(tiny_backbone_path: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "causal"
    shutil.copytree(tiny_backbone_path, checkpoint)
    assert "is_causal" not in (checkpoint / "config.json").read_text()
    with pytest.raises(CocoaError, match="is causal"):
        build_sentence_transformer(checkpoint, prompts=PROMPTS)


# Wrong input


def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CocoaError, match="holds something else"):
        export_model(checkpoint, tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_an_earlier_export_is_replaced(checkpoint: Path, tiny_export: Path, tmp_path: Path) -> None:
    out = tmp_path / "cocoa-qwen2vl"
    shutil.copytree(tiny_export, out)
    (out / "stale.txt").write_text("of the earlier export")
    (out / "model.safetensors").write_bytes(b"stale")
    export_model(checkpoint, out)
    assert contents(out) == contents(tiny_export)


def damage(file: Path, kind: str) -> None:
    """Cut a file of weights in half, or make all weights NaN."""
    if kind == "truncated":
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    else:
        weights = {name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("kind", "reason"), [("truncated", "the checkpoint is incomplete"), ("NaN", "not finite")])
def test_damaged_weights_are_refused_in_one_sentence(checkpoint: Path, tmp_path: Path, kind: str, reason: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    damage(broken / "model.safetensors", kind)
    with pytest.raises(CocoaError, match=reason) as error:
        export_model(broken, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", ["*.safetensors", TRAINING_FILE, "*", None])
def test_a_checkpoint_without_weights_or_record_is_refused_in_one_sentence(
    checkpoint: Path, tmp_path: Path, lost: str | None
) -> None:
    incomplete = tmp_path / "incomplete"
    if lost:
        shutil.copytree(checkpoint, incomplete, ignore=shutil.ignore_patterns(lost))
    with pytest.raises(CocoaError, match=r"incomplete is no checkpoint: it needs") as error:
        export_model(incomplete, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert "cocoa-embed train" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("record", ["", "{", "{}", "[]"])
def test_a_checkpoint_with_a_broken_record_is_refused(checkpoint: Path, tmp_path: Path, record: str) -> None:
    """An export that was cut short leaves an empty record: the marker is written first."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / TRAINING_FILE).write_text(record)
    with pytest.raises(CocoaError, match=re.escape(TRAINING_FILE)):
        export_model(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exporting_to_the_checkpoint_itself_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "stage"
    shutil.copytree(checkpoint, copy)
    before = contents(copy)
    monkeypatch.chdir(tmp_path)
    for out in (copy, Path("stage"), tmp_path / "other" / ".." / "stage", tmp_path):
        (tmp_path / "other").mkdir(exist_ok=True)
        with pytest.raises(CocoaError, match="is or holds the checkpoint"):
            export_model(copy, out)
    assert contents(copy) == before


# The model card


def split_card(card: str) -> tuple[dict[str, Any], str]:
    _, front_matter, body = card.split("---\n", maxsplit=2)
    return yaml.safe_load(front_matter), body


def table_rows(body: str, first_cell: str) -> list[str]:
    rows = [line for line in body.splitlines() if line.startswith(f"| {first_cell} |")]
    return [cell.strip() for cell in rows[0].strip("|").split("|")] if rows else []


def test_the_card_says_how_the_model_was_made_and_is_used(tiny_export: Path) -> None:
    front_matter, body = split_card((tiny_export / "README.md").read_text())
    assert front_matter["library_name"] == "sentence-transformers"
    assert "base_model" not in front_matter, "only a hub name has a page to link to"
    assert "license" not in front_matter, "of a backbone from elsewhere it is not known"
    assert "a-tiny-backbone" in body
    assert "32 dimensions" in body
    assert f'"{PROMPTS["query"]}"' in body
    assert f'"{PROMPTS["document"]}"' in body
    assert f"{TINY_MAX_LENGTH} tokens" in body
    assert "12544 pixels" in body
    assert "Seed 17" in body
    assert 'SentenceTransformer("cocoa-qwen2vl")' in body
    assert table_rows(body, "warmup") == ["warmup", "11", "4", "0.0003", "1.234"]
    assert table_rows(body, "contrastive") == ["contrastive", "13", "8", "0.0005", "0.567"]
    assert not table_rows(body, "bridge"), "a stage that was not run is not told"
    assert "Nothing was measured" in body


def test_the_card_tells_results_and_data(model: SentenceTransformer, tmp_path: Path) -> None:
    metrics = {"recall@1": 0.875, "recall@5": 0.95, "recall@10": 1.0, "mrr": 0.9014}
    training = {**TRAINING, "data": "8000 drawn scenes", "results": {"text to image, 500 scenes": metrics}}
    save_sentence_transformer(model, tmp_path / "out", training)
    _, body = split_card((tmp_path / "out" / "README.md").read_text())
    assert table_rows(body, "text to image, 500 scenes")[1:] == ["0.875", "0.950", "1.000", "0.901"]
    assert "8000 drawn scenes" in body
    assert "Nothing was measured" not in body
    assert json.loads((tmp_path / "out" / TRAINING_FILE).read_text()) == training


def test_the_card_of_a_model_without_stages_or_prompts_says_so(model: SentenceTransformer) -> None:
    recipe = {**TRAINING["recipe"], "prompts": {"query": "", "document": ""}}
    _, body = split_card(model_card("bare", model, {**TRAINING, "recipe": recipe, "stages": []}))
    assert "No stage was run" in body
    assert "`encode_query` puts nothing before a query" in body


def card_body(model: SentenceTransformer, **contrastive: Any) -> str:
    """Return the card of a model whose contrastive stage has these values in its record."""
    stages = [TRAINING["stages"][0], {**TRAINING["stages"][1], **contrastive}]
    return " ".join(split_card(model_card("my-model", model, {**TRAINING, "stages": stages}))[1].split())


def test_the_card_says_how_the_contrastive_stage_was_trained(model: SentenceTransformer) -> None:
    def card(**settings: Any) -> str:
        return card_body(model, **alone(Contrastive, ContrastiveSettings(steps=1, batch_size=2, **settings)).facts())

    plain = card()
    assert "InfoNCE at temperature 0.02, with in-batch negatives and no hard negatives." in plain
    assert "Each pair is trained in both directions, as two rows." in plain
    assert "looks for its query" not in plain
    other = card(temperature=0.1, hard_negatives=3, directions="symmetric")
    assert "InfoNCE at temperature 0.1, with in-batch negatives and up to 3 hard negatives of each" in other
    assert "Each positive looks for its query too, in the same loss." in other
    assert "both directions" not in other
    assert "Contrastive learning" not in card_body(model)


def test_the_cards_way_to_shorter_embeddings_works(model: SentenceTransformer, tiny_export: Path) -> None:
    assert "truncate_dim" not in card_body(model, matryoshka_dims=None)
    assert "truncate_dim" not in card_body(model, matryoshka_dims=[32]), "that is all of it"
    body = card_body(model, matryoshka_dims=[8, 32, 16])
    assert "The first 16 or 8 values of an embedding" in body
    assert 'SentenceTransformer("my-model", truncate_dim=16)' in body
    assert "`normalize_embeddings=True`" in body
    short = SentenceTransformer(str(tiny_export), device="cpu", truncate_dim=16)
    embeddings = short.encode([{"text": "a red ring"}], normalize_embeddings=True)
    expected = model.encode([{"text": "a red ring"}])[:, :16]
    np.testing.assert_allclose(embeddings, expected / np.linalg.norm(expected, axis=1, keepdims=True), **SAME)


def test_the_card_names_the_stages_that_trained_adapters(model: SentenceTransformer) -> None:
    assert "Adapters" not in card_body(model)
    adapter = {"kind": "dora", "r": 4, "alpha": 64}
    expected = "Adapters, merged into the weights at the end of their stage: contrastive DoRA (r 4, alpha 64)."
    assert expected in card_body(model, adapter=adapter)


@pytest.mark.parametrize("backbone", ["Qwen/Qwen2-VL-2B-Instruct", "./my: models/#1", "[a] & *b", "@home", "007"])
def test_the_cards_front_matter_survives_any_backbones_name(model: SentenceTransformer, backbone: str) -> None:
    training = {**TRAINING, "backbone": backbone}
    from_hub, _ = split_card(model_card("model", model, {**training, "origin": "hub"}))
    assert from_hub["base_model"] == backbone
    from_folder, _ = split_card(model_card("model", model, {**training, "origin": "folder"}))
    assert "base_model" not in from_folder, "a folder may be named as a model on the hub is"


def test_what_comes_of_the_packages_own_backbone_has_the_packages_licence(model: SentenceTransformer) -> None:
    front_matter, _ = split_card(model_card("model", model, {**TRAINING, "origin": "built-in"}))
    assert front_matter["license"] == "apache-2.0"


def test_an_export_over_a_stages_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """It looks like an earlier export, but hours of training are in it."""
    for stage in ("bridge", "contrastive"):
        shutil.copytree(checkpoint, tmp_path / "run" / stage)
    (tmp_path / "run" / RUN_MARKER).touch()
    before = contents(tmp_path / "run")
    for out in ("bridge", "bridge/model", "contrastive/model"):
        with pytest.raises(CocoaError, match=f"{out} is in the folder of a training run"):
            export_model(tmp_path / "run" / "contrastive", tmp_path / "run" / out)
    assert contents(tmp_path / "run") == before


def test_the_cards_code_runs_and_imports_only_what_it_uses(
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
    imported = {
        name for line in code.splitlines() if " import " in line for name in line.split(" import ")[1].split(", ")
    }
    used = code.split("\n\n", maxsplit=1)[1]
    assert {name for name in imported if name not in used} == set()
