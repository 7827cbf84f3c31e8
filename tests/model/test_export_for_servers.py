"""What servers need of an export: names of weights, config, pooling, the same token ids by every way of rendering."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import PROMPTS, TRAINING, contents, write_checkpoint
from PIL import Image
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from tiny_backbones import TINY_MAX_LENGTH, every_family, every_qwen
from transformers import AutoModel, AutoProcessor

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import (
    _pooling_flags,
    as_generation_model,
    build_sentence_transformer,
    export_model,
    save_sentence_transformer,
)
from cocoa_embed.model.families.registry import FAMILIES, family_of_images
from cocoa_embed.model.loading import load_model

SAME = {"rtol": 0, "atol": 1e-5}
LONG_TEXT = "blue cross on white " * 200

VLLM_RENAMES = {
    "qwen2_vl": {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    },
    "qwen3_vl": {
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
    },
}
"""How vLLM renames the prefixes of a checkpoint's weights, by model type; the first that fits counts."""
VLLM_RENAMES["qwen2_5_vl"] = VLLM_RENAMES["qwen2_vl"]

MERGED = r"(q|k|v)_proj|(gate|up)_proj|o_proj|down_proj"
NORMS = r"(input|post_attention)_layernorm|self_attn\.(q|k)_norm"
LANGUAGE_MODEL = rf"language_model\.model\.(embed_tokens|norm|layers\.\d+\.({NORMS}|(self_attn|mlp)\.({MERGED})))"
BLOCK = r"norm\d|attn\.(qkv|proj)|mlp\.((linear_)?fc\d|gate_proj|up_proj|down_proj)"
MERGER = r"(merger|deepstack_merger_list\.\d+)\.(ln_q|norm|mlp\.\d|linear_fc\d)"
VLLM_PARAMETERS = re.compile(
    rf"({LANGUAGE_MODEL}|visual\.(patch_embed\.proj|pos_embed|blocks\.\d+\.({BLOCK})|{MERGER}))\.(weight|bias)"
)
"""The parameters of vLLM's model of these families, before it joins projections such as ``q_proj`` and ``k_proj``."""


def vllm_name(name: str, family: str) -> str:
    """Return the name of vLLM's parameter for a saved weight."""
    for prefix, renamed in VLLM_RENAMES[family].items():
        if name.startswith(prefix):
            return renamed + name.removeprefix(prefix)
    return name


def saved_names(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in safe_open(path, framework="pt").keys()}


def read(path: Path) -> Any:  # noqa: ANN401
    return json.loads(path.read_text(encoding="utf-8"))


@every_qwen
def test_every_saved_weight_has_a_parameter_in_vllm(family: str, tiny_export: Path) -> None:
    names = saved_names(tiny_export)
    assert len(names) > 60
    renamed = {vllm_name(name, family) for name in names}
    assert len(renamed) == len(names)
    assert [name for name in sorted(renamed) if not VLLM_PARAMETERS.fullmatch(name)] == []
    base = {f"language_model.{name.split('language_model.model.')[1]}" for name in renamed if "language_model" in name}
    assert [name for name in base if VLLM_PARAMETERS.fullmatch(vllm_name(name, family))] == [], "a base model's names"


@every_family
def test_both_transformers_classes_load_it_with_no_weight_missing_or_unexpected(family: str, tiny_export: Path) -> None:
    assert read(tiny_export / "config.json")["architectures"] == [FAMILIES[family].model_class.__name__]
    for loader in (FAMILIES[family].model_class, AutoModel):
        model, info = loader.from_pretrained(tiny_export, output_loading_info=True)
        assert not any(info.values()), (type(model).__name__, info)


@every_family
@pytest.mark.parametrize(
    ("prompt", "text", "has_image"),
    [
        (None, "a red ring", False),
        (PROMPTS["query"], "a red ring", True),
        (PROMPTS["document"], None, True),
        (None, "", False),
        (None, " <|endoftext|><|im_end|> is the end, <|image_pad|>\n", True),
    ],
)
def test_token_ids_are_equal_by_every_way_of_rendering_and_end_in_one_eos(
    tiny_export: Path, scene_rows: list[Row], prompt: str | None, text: str | None, has_image: bool
) -> None:
    model = SentenceTransformer(str(tiny_export), device="cpu")
    processor = AutoProcessor.from_pretrained(tiny_export)
    image = Image.open(scene_rows[0].image).convert("RGB")
    item = ({"image": image} if has_image else {}) | ({} if text is None else {"text": text})
    expected = model.preprocess([item], prompt=prompt)["input_ids"][0].tolist()

    parts = [{"type": kind, kind: value} for kind, value in item.items()]
    system = [] if prompt is None else [{"role": "system", "content": [{"type": "text", "text": prompt}]}]
    messages = [*system, {"role": "user", "content": parts}]
    rendered = processor.apply_chat_template(messages, tokenize=False)
    images = {"images": [image]} if has_image else {}
    bare = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    found = [bare[0] if isinstance(bare[0], list) else bare]
    markers = family_of_images(processor).markers
    added = processor.tokenizer(markers.token + markers.before + markers.after, add_special_tokens=False)["input_ids"]
    for add_special_tokens in (True, False):
        found.append(processor(text=[rendered], **images, add_special_tokens=add_special_tokens)["input_ids"][0])
        tokens = processor.tokenizer(rendered, add_special_tokens=add_special_tokens)["input_ids"]
        assert [token for token in tokens if token not in added] == [token for token in expected if token not in added]
    assert all(list(ids) == expected for ids in found), (expected, found)
    assert expected.count(processor.tokenizer.eos_token_id) == 1
    assert expected[-1] == processor.tokenizer.eos_token_id
    assert (markers.image in rendered) == has_image


@every_family
def test_sentence_transformers_cuts_a_long_text_but_never_its_eos_beside_an_image_or_alone(
    tiny_export: Path, scene_rows: list[Row]
) -> None:
    model = SentenceTransformer(str(tiny_export), device="cpu")
    image = Image.open(scene_rows[0].image).convert("RGB")
    for item in ({"text": LONG_TEXT}, {"image": image, "text": LONG_TEXT}):
        ids = model.preprocess([item])["input_ids"][0].tolist()
        assert len(ids) == TINY_MAX_LENGTH
        assert [place for place, token in enumerate(ids) if token == model.tokenizer.eos_token_id] == [len(ids) - 1]


def test_the_config_says_bidirectional_where_vllm_looks_and_causal_for_a_baseline(
    tiny_export: Path, tiny_backbone_path: Path, tmp_path: Path
) -> None:
    config = read(tiny_export / "config.json")
    assert (config["is_causal"], config["text_config"]["is_causal"]) == (False, False)
    backbone = load_backbone(str(tiny_backbone_path), bidirectional=False)
    causal = as_generation_model(backbone.model.model, []).config
    assert (causal.is_causal, causal.text_config.is_causal) == (True, True)


def test_the_pooling_reads_as_last_token_for_servers_of_any_age(tiny_export: Path) -> None:
    modules = read(tiny_export / "modules.json")
    kinds = [module["type"] for module in modules]
    assert kinds == [f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")]
    pooling = read(tiny_export / modules[1]["path"] / "config.json")
    assert pooling["pooling_mode"] == "lasttoken"
    true = [name for name, value in pooling.items() if value is True]
    assert true[0] == "pooling_mode_lasttoken", "old ones take the first"
    assert [name for name in true if name.startswith("pooling_mode_")] == true[:1]
    flags = _pooling_flags({"pooling_mode": "mean"})
    assert [name for name, value in flags.items() if value] == ["pooling_mode_mean_tokens"]
    assert flags.keys() <= pooling.keys()


@pytest.mark.parametrize(("trained", "expected"), [([8, 16], [32, 16, 8]), ([], None)])
def test_the_config_lists_the_dimensions_that_training_had(
    checkpoint: Path, tmp_path: Path, trained: list[int], expected: list[int] | None
) -> None:
    last = {**TRAINING["stages"][-1], "matryoshka_dims": trained}
    model = build_sentence_transformer(checkpoint, prompts=PROMPTS, device="cpu")
    kind = type(model[0].model)
    out = save_sentence_transformer(model, tmp_path / "out", {**TRAINING, "stages": [TRAINING["stages"][0], last]})
    config = read(out / "config.json")
    assert (config.get("matryoshka_dimensions"), config.get("is_matryoshka", False)) == (expected, bool(expected))
    assert type(model[0].model) is kind, "the model in memory is as before"


@pytest.mark.parametrize("package", ["transformers", "sentence_transformers", "torchvision"])
def test_an_older_library_is_refused_by_name_and_with_the_remedy(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    SentenceTransformer(str(tiny_export), device="cpu")
    monkeypatch.setattr(__import__(package), "__version__", "0.1")
    with pytest.raises(ImportError, match=rf"{package.replace('_', '-')}>=.*0\.1 is installed(.|\n)*pip install"):
        SentenceTransformer(str(tiny_export), device="cpu")


def test_a_backbone_with_its_own_head_is_exported_without_it(tiny_backbone_path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_backbone_path, tmp_path / "untied"))
    config = read(folder / "config.json")
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = FAMILIES["qwen2_vl"].model_class.from_pretrained(folder)
    model.lm_head.weight.data.normal_()
    model.save_pretrained(folder)
    assert "lm_head.weight" in saved_names(folder)
    checkpoint = write_checkpoint(load_backbone(str(folder), max_length=TINY_MAX_LENGTH), tmp_path / "checkpoint")
    out = export_model(checkpoint, tmp_path / "out")
    assert "lm_head.weight" not in saved_names(out)
    _, info = FAMILIES["qwen2_vl"].model_class.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    expected = build_sentence_transformer(checkpoint, prompts=PROMPTS, device="cpu").encode("a red ring")
    np.testing.assert_allclose(SentenceTransformer(str(out), device="cpu").encode("a red ring"), expected, **SAME)


def as_exported_before(model: SentenceTransformer, folder: Path) -> Path:
    """Write a folder as exports were: a base model's names, no ``<EOS>`` in the template, nothing for servers."""
    model = copy.deepcopy(model)
    model.tokenizer.sep_token = None
    model.processor.chat_template = model.processor.chat_template.partition("{%- if not sep_token")[0]
    model.save(str(folder), create_model_card=False)
    return folder


@every_family
def test_older_exports_and_those_saved_again_by_sentence_transformers_embed_the_same(
    tiny_export: Path, scene_rows: list[Row], tmp_path: Path
) -> None:
    model = SentenceTransformer(str(tiny_export), device="cpu")
    image = Image.open(scene_rows[0].image).convert("RGB")
    items = [{"text": "a red ring"}, {"image": image}, {"image": image, "text": LONG_TEXT}]
    expected = model.encode(items, prompt_name="query")
    before = as_exported_before(model, tmp_path / "before")
    model.save(str(tmp_path / "again"))
    for folder in (before, tmp_path / "again"):
        assert any(name.startswith(("language_model.", "text_model.")) for name in saved_names(folder))
        loaded = load_model(folder, "cpu")
        np.testing.assert_allclose(loaded.encode(items, prompt_name="query"), expected, **SAME)
        processor = AutoProcessor.from_pretrained(folder)
        rendered = processor.apply_chat_template([{"role": "user", "content": "a red ring"}], tokenize=False)
        ids = processor.tokenizer(rendered)["input_ids"]
        assert ids.count(processor.tokenizer.eos_token_id) == 1
        load_backbone(str(folder))


def test_an_older_checkpoint_is_exported_like_any_other(checkpoint: Path, tiny_export: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(checkpoint, tmp_path / "old"))
    template = old / "chat_template.jinja"
    template.write_text(template.read_text().partition("{%- if not sep_token")[0])
    settings = read(old / "tokenizer_config.json")
    assert settings.pop("sep_token")
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    assert contents(export_model(old, tmp_path / "cocoa-qwen2vl")) == contents(tiny_export)


def test_an_export_loads_without_a_warning(tiny_export: Path, recwarn: pytest.WarningsRecorder) -> None:
    SentenceTransformer(str(tiny_export), device="cpu").encode("a red ring")
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)] == []
