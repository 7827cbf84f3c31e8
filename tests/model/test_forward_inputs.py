from typing import Any

import pytest
import torch
from tiny_backbones import every_family, every_qwen, stock_inputs
from torch.utils.data import DataLoader

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.forward_inputs import HostInputs, forward_inputs
from cocoa_embed.model.host_tensor import HostTensor, on_host, places
from cocoa_embed.train.stages.rendering import render_items


@pytest.fixture
def batch(tiny_backbone: Backbone, scene_rows: list[Row]) -> dict[str, Any]:
    """A row of two images, one of a text, and one of an image and a long text."""
    first, second, third = (row.image for row in scene_rows[:3])
    items = [Item(images=(first, second)), Item(text="a ring"), Item(text="a small red ring " * 3, images=(third,))]
    batch = render_items(tiny_backbone.processor, items)
    assert not batch["attention_mask"].all()
    return batch


@every_family
@pytest.mark.parametrize("rows", [[0, 1, 2], [1]])
@torch.no_grad()
def test_a_model_computes_the_same_with_and_without_host_inputs(
    tiny_backbone: Backbone, batch: dict[str, Any], rows: list[int]
) -> None:
    model = tiny_backbone.model.eval()
    if rows == [1]:
        batch = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    expected = model.base_model(**stock_inputs(model, batch), use_cache=False).last_hidden_state
    inputs = forward_inputs(model, HostInputs(model.config)(batch))
    assert ("input_ids" in inputs) is ("pixel_values" not in batch)
    found = model.base_model(**inputs, attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@every_qwen
def test_the_vision_encoder_is_given_what_it_would_compute_itself(
    tiny_backbone: Backbone, batch: dict[str, Any], family: str
) -> None:
    prepared = HostInputs(tiny_backbone.model.config)(batch)
    patches = len(batch["pixel_values"])
    assert prepared["image_position_ids"].shape == (patches, 2)
    assert prepared["image_cu_seqlens"][-1] == patches
    assert prepared["image_max_seqlen"] == batch["image_grid_thw"].prod(1).max()
    assert ("image_window_index" in prepared) is (family == "qwen2_5_vl")
    on_cpu = {name for name, value in prepared.items() if isinstance(value, HostTensor)}
    assert on_cpu == {"image_grid_thw", "image_digests", "image_cu_seqlens"} | (
        {"image_cu_window_seqlens"} & prepared.keys()
    )


def test_visual_tokens_that_are_not_those_of_the_images_are_refused(
    tiny_backbone: Backbone, batch: dict[str, Any]
) -> None:
    batch["mm_token_type_ids"][0] = 0
    with pytest.raises(ValueError, match=r"has 4 visual tokens, but its images have 12"):
        HostInputs(tiny_backbone.model.config)(batch)


def test_a_host_tensor_stays_where_batches_are_moved_and_so_do_its_parts() -> None:
    tensor = on_host(torch.arange(6).view(2, 3))
    assert tensor.to("meta") is tensor
    for part in (tensor[1:], tensor.index_select(0, torch.tensor([1]))):
        assert isinstance(part, HostTensor)
        assert part.tolist() == [[3, 4, 5]]
    assert tensor.on(torch.device("meta")).is_meta
    for result in (tensor + 1, tensor.on(torch.device("cpu")), tensor.cpu(), tensor.sum(dim=1)):
        assert type(result) is torch.Tensor


def test_a_host_tensor_comes_out_of_a_worker_as_one() -> None:
    loader = DataLoader([1, 2], batch_size=2, num_workers=1, collate_fn=host_batch)
    (batch,) = loader
    assert isinstance(batch["numbers"], HostTensor)
    assert batch["numbers"].tolist() == [1, 2]


def host_batch(numbers: list[int]) -> dict[str, HostTensor]:
    return {"numbers": on_host(torch.tensor(numbers))}


def test_places_are_those_of_nonzero() -> None:
    mask = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) > 0.6
    assert places(mask, int(mask.sum())).tolist() == mask.flatten().nonzero().flatten().tolist()
    assert places(mask, 0).shape == (0,)
