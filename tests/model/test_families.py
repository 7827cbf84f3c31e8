"""Every supported family through the three stages, the export, and a plain SentenceTransformer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from exported import PROMPTS
from PIL import Image
from sentence_transformers import SentenceTransformer
from stages import alone
from tiny_backbones import FAMILIES, TINY_MAX_LENGTH, every_family_but_twins, every_qwen, stock_inputs
from transformers import PreTrainedModel

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.model.families.registry import FAMILIES as SUPPORTED
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.families.squares import Squares
from cocoa_embed.model.forward_inputs import HostInputs
from cocoa_embed.model.training_record import read_run
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.stages.contrastive.inputs import preprocess_items
from cocoa_embed.train.stages.contrastive.model import as_sentence_transformer
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.rendering import render_items


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """The trained model, loaded as a plain SentenceTransformer."""
    return SentenceTransformer(str(export_model(finished / "contrastive", tmp_path_factory.mktemp("model") / "cocoa")))


def test_every_supported_family_has_a_tiny_backbone() -> None:
    assert FAMILIES.keys() == SUPPORTED.keys()


@every_family_but_twins
def test_each_stage_learns_from_text_and_image(family: str, tiny_backbone: Backbone, finished: Path) -> None:
    before = tiny_backbone.model
    assert type(before) is SUPPORTED[family].model_class
    for stage, record in read_run(finished)["stages"].items():
        after = load_backbone(str(finished / stage), max_length=TINY_MAX_LENGTH).model
        for part in (family_of(before.config).encoder, PreTrainedModel.get_decoder):
            first, last = (part(model).state_dict() for model in (before, after))
            assert any(not torch.equal(first[name], last[name]) for name in first), (stage, part)
        assert np.isfinite([line["loss"] for line in record["log"] if "loss" in line]).all()
        before = after


@every_family_but_twins
def test_the_export_encodes_any_item_into_one_space_bidirectionally(
    family: str, exported: SentenceTransformer, scene_rows: list[Row]
) -> None:
    assert exported[0].auto_model.config.model_type == family
    assert_bidirectional(exported[0].auto_model)
    image = Image.open(scene_rows[0].image)
    items = [{"text": "a red ring"}, {"image": image}, {"image": image, "text": "blue cross on white " * 200}]
    together = exported.encode(items)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, np.concatenate([exported.encode([item]) for item in items]), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


@every_family_but_twins
def test_the_plain_export_embeds_as_the_model_does_in_training(
    finished: Path, exported: SentenceTransformer, scene_rows: list[Row]
) -> None:
    backbone = load_backbone(str(finished / "contrastive"), max_length=TINY_MAX_LENGTH)
    run_of = alone(Contrastive, ContrastiveSettings(steps=1, batch_size=2)).run
    model = as_sentence_transformer(backbone, run_of).to("cpu").eval()
    items = [Item("a red ring"), Item(images=(scene_rows[0].image,)), Item("blue", images=(scene_rows[1].image,))]
    with torch.no_grad():
        ours = model(preprocess_items(model, items))["sentence_embedding"].numpy()
    np.testing.assert_allclose(exported.encode([item.load() for item in items]), ours, atol=1e-5)
    assert np.abs(ours[1] - ours[2]).max() > 1e-3


def test_every_stage_stays_causal_and_so_does_the_export(small_recipe: Recipe, tmp_path: Path) -> None:
    results = run(small_recipe.model_copy(update={"bidirectional": False}), tmp_path / "out")
    exported = export_model(results[-1].folder, tmp_path / "model")
    model = SentenceTransformer(str(exported), device="cpu")
    with pytest.raises(CocoaError, match="is causal"):
        assert_bidirectional(model[0].auto_model)
    assert "made bidirectional" not in (exported / "README.md").read_text()


@every_qwen
def test_an_image_has_the_temporal_position_after_its_marker(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    """transformers 5.4 to 5.5.3 scale the temporal positions of Qwen2.5-VL's images as if they were videos."""
    batch = render_items(
        tiny_backbone.processor, [Item(text="a red ring", images=(row.image,)) for row in scene_rows[:2]]
    )
    positions = HostInputs(tiny_backbone.model.config)(batch)["position_ids"]
    is_image = batch["input_ids"] == tiny_backbone.model.config.image_token_id
    first = is_image.int().argmax(dim=1)
    for row, start in enumerate(first.tolist()):
        assert set(positions[0, row, is_image[row]].tolist()) == {start}


@every_family_but_twins
@pytest.mark.parametrize(
    ("prompt", "text"),
    [("", None), (PROMPTS["query"], None), ("", "a\n{red} ring"), (PROMPTS["query"], "blue cross on white " * 200)],
)
def test_inputs_are_equal_in_training_and_in_inference(
    tiny_backbone: Backbone, exported: SentenceTransformer, scene_rows: list[Row], text: str | None, prompt: str
) -> None:
    path = scene_rows[0].image
    in_training = render_items(tiny_backbone.processor, [Item(text=f"{prompt}{text or ''}" or None, images=(path,))])
    in_inference = exported.preprocess([Item(text, (path,)).load()], prompt=prompt or None)
    family = family_of(tiny_backbone.model.config)
    if isinstance(family, Squares):  # whose stock class takes whole images
        in_training = stock_inputs(tiny_backbone.model, in_training) | {"image_digests": in_training["image_digests"]}
        assert in_inference.get("pixel_attention_mask", torch.ones(1)).all()
    assert in_training.keys() - in_inference.keys() == {"image_digests"}
    for key in in_training.keys() & in_inference.keys():
        assert torch.equal(in_training[key], in_inference[key]), key
