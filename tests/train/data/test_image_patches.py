"""The patches of a batch are those of the image processor, made of one image at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cocoa_embed.data.rows import Item
from cocoa_embed.images.load import load_image
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.image_patches import image_patches, normalised, patch_digests
from cocoa_embed.train.stages.rendering import render_items


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Images that are enlarged, kept and reduced by the processor."""
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(30, 40), (56, 56), (200, 90), (900, 700)]):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.glob("*.png"))


def test_patches_are_those_of_the_image_processor(tiny_backbone: Backbone, pictures: list[Path]) -> None:
    processor = tiny_backbone.processor
    expected = processor.image_processor([load_image(path) for path in pictures], return_tensors="pt")
    patches, grid = image_patches(pictures, processor)
    assert patches.dtype == torch.uint8
    assert torch.equal(grid, expected["image_grid_thw"])
    assert torch.equal(normalised(patches, processor), expected["pixel_values"])


def test_items_of_several_images_are_rendered_as_the_processor_renders_them(
    tiny_backbone: Backbone, pictures: list[Path]
) -> None:
    items = [Item("a", tuple(pictures[:2])), Item("two words"), Item(images=(pictures[2],), instruction="find: ")]
    batch = render_items(tiny_backbone.processor, items)
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = tiny_backbone.processor(
        text=[f"{vision}{vision}a", "two words", f"{vision}find: "],
        images=[load_image(path) for path in pictures[:3]],
        padding=True,
        return_tensors="pt",
    )
    assert batch.keys() == {*expected.keys(), "image_digests"}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"):
        assert torch.equal(batch[name], expected[name]), name


def test_digests_are_equal_for_equal_patches_of_equal_shape_and_scale(
    tiny_backbone: Backbone, pictures: list[Path]
) -> None:
    processor = tiny_backbone.processor.image_processor
    patches, grids = image_patches([*pictures, pictures[1]], tiny_backbone.processor)
    found = [tuple(each) for each in patch_digests(patches, grids, processor).tolist()]
    assert found[4] == found[1]
    assert len({*found}) == len(pictures)
    alone = patch_digests(*image_patches(pictures[2:3], tiny_backbone.processor), processor)
    assert [tuple(each) for each in alone.tolist()] == [found[2]]
    transposed = grids[:, [0, 2, 1]]
    assert (grids[2] != transposed[2]).any()
    assert tuple(patch_digests(patches, transposed, processor)[2].tolist()) != found[2]
    processor.image_mean = [0.5, 0.5, 0.4]
    assert tuple(patch_digests(patches, grids, processor)[2].tolist()) != found[2]
