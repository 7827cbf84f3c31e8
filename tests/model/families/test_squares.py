"""Images that are one square each, of a size that can be limited, cut into what stands behind their visual tokens."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny_backbones import TINY_MAX_LENGTH
from transformers import AutoProcessor, Idefics3ImageProcessor, Idefics3Processor

from cocoa_embed.data.rows import Item
from cocoa_embed.encode.batches import token_counter
from cocoa_embed.errors import UsageError
from cocoa_embed.model.backbone import Backbone, load_backbone, load_processor
from cocoa_embed.model.card import model_card
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.families.smolvlm import SmolVLM
from cocoa_embed.model.families.squares import Squares
from cocoa_embed.train.settings import RunSettings
from cocoa_embed.train.stages.rendering import render_items

every_square = pytest.mark.parametrize("family", ["idefics3", "internvl"], indirect=True, scope="session")
smolvlm = pytest.mark.parametrize("family", ["idefics3"], indirect=True, scope="session")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def square(backbone: Backbone) -> Squares:
    family = family_of(backbone.model.config)
    assert isinstance(family, Squares)
    return family


@every_square
def test_an_image_is_the_processors_own_square(tiny_backbone: Backbone, picture: Path) -> None:
    processor = tiny_backbone.processor
    batch = render_items(processor, [Item("a", (picture, picture))])
    expected = processor.image_processor(Image.open(picture), return_tensors="pt")["pixel_values"].flatten(0, -4)
    assert expected.shape == (1, 3, 64, 64)
    found = square(tiny_backbone).images(batch["pixel_values"], batch["image_grid_thw"])
    assert torch.equal(found, expected.expand(2, -1, -1, -1))


@smolvlm
def test_a_side_that_tokens_do_not_divide_is_cut_as_the_encoder_cuts_it(tiny_backbone: Backbone, picture: Path) -> None:
    """As 384 pixels in 27 patches of 14, or 81 tokens of 42 x 42."""
    processor = tiny_backbone.processor
    processor.image_processor.max_image_size["longest_edge"] = 66
    assert (SmolVLM.image_geometry(processor).patch_size, SmolVLM.most_pixels(processor)) == (16, 66**2)
    batch = render_items(processor, [Item("a", (picture,))])
    expected = processor.image_processor(Image.open(picture), return_tensors="pt")["pixel_values"][0]
    found = square(tiny_backbone).images(batch["pixel_values"], batch["image_grid_thw"])
    assert torch.equal(found, expected[:, :, :64, :64])


@every_square
@pytest.mark.parametrize(("pixels", "side"), [(10**6, 4), (64**2, 4), (64**2 - 1, 3), (32**2, 2), (16**2, 1)])
def test_max_pixels_makes_the_square_smaller_and_the_saved_model_keeps_it(
    tiny_backbone_path: Path, picture: Path, tmp_path: Path, pixels: int, side: int
) -> None:
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, max_pixels=pixels)
    batch = render_items(backbone.processor, [Item("a", (picture,))])
    assert batch["image_grid_thw"].tolist() == [[1, side, side]]
    backbone.save(tmp_path / "saved")
    model: SentenceTransformer = build_sentence_transformer(tmp_path / "saved", prompts={}, device="cpu")
    given = [{"image": Image.open(picture), "text": "a"}]
    assert token_counter(model)(200, 90) == side**2, "what limits a batch"
    assert model.preprocess(given)["input_ids"].tolist() == batch["input_ids"].tolist()
    assert np.isfinite(model.encode(given)).all()
    recipe = RunSettings(name="m", backbone="b").model_dump()
    training = {"backbone": "b", "origin": "folder", "data": "d", "stages": [], "recipe": recipe}
    assert f"scaled down to {(side * 16) ** 2} pixels" in " ".join(model_card("m", model, training).split())


@every_square
def test_a_limit_below_a_visual_token_is_refused(tiny_backbone_path: Path) -> None:
    with pytest.raises(UsageError, match=r"max_pixels is 255, but a visual token has 16 x 16; raise it\."):
        load_processor(str(tiny_backbone_path), max_pixels=255)


@pytest.mark.parametrize("family", ["internvl"], indirect=True, scope="session")
def test_no_image_becomes_tiles_though_the_stock_processor_cuts_it(
    tiny_backbone_path: Path, tiny_backbone: Backbone, picture: Path
) -> None:
    counts = []
    for processor in (AutoProcessor.from_pretrained(tiny_backbone_path), tiny_backbone.processor):
        done = processor(images=[Image.open(picture)], text="<IMG_CONTEXT>", return_tensors="pt")
        counts.append((len(done["pixel_values"]), int((done["input_ids"] == processor.image_token_id).sum())))
    assert counts == [(3, 48), (1, 16)], "two tiles and the whole image, 16 visual tokens each"


@pytest.mark.parametrize("family", ["smolvlm"], indirect=True, scope="session")
def test_smolvlm2_needs_no_package_for_numbers_as_words(
    tiny_backbone_path: Path, tiny_backbone: Backbone, picture: Path, tmp_path: Path
) -> None:
    if find_spec("num2words") is None:
        with pytest.raises(ImportError, match="num2words"):
            AutoProcessor.from_pretrained(tiny_backbone_path)
    tiny_backbone.save(tmp_path / "saved")
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(tiny_backbone.processor) is type(loaded) is Idefics3Processor
    old = Idefics3ImageProcessor(**{**loaded.image_processor.to_dict(), "image_processor_type": None})
    first, second = (each(Image.open(picture), return_tensors="pt") for each in (old, loaded.image_processor))
    assert torch.equal(first["pixel_values"], second["pixel_values"])
