from itertools import pairwise

import pytest
from fake_model import FakeModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_backbones import every_family
from transformers import CLIPImageProcessor, Qwen2VLImageProcessor

from cocoa_embed.encode.batches import BatchLimits, ImageCost, patch_counter, plan_batches, token_counter
from conftest import LoadTiny

costs = st.lists(
    st.builds(
        ImageCost,
        tokens=st.integers(1, 2000),
        width=st.integers(1, 6000),
        height=st.integers(1, 6000),
    ),
    max_size=60,
)
limits = st.builds(
    BatchLimits,
    images=st.integers(1, 40),
    tokens=st.integers(1, 4000),
    decoded_bytes=st.integers(1, 2**27),
)


class Processed:
    """Stands for a model with a real processor."""

    def __init__(self, processor: object) -> None:
        self.processor = processor


@given(costs, limits)
def test_every_image_is_in_one_batch_and_no_batch_exceeds_a_limit_unless_one_image_does(
    costs: list[ImageCost], limits: BatchLimits
) -> None:
    batches = plan_batches(costs, limits)
    assert sorted(place for batch in batches for place in batch) == list(range(len(costs)))
    for batch in batches:
        members = [costs[place] for place in batch]
        assert len(members) == 1 or (
            len(members) <= limits.images
            and len(members) * max(cost.tokens for cost in members) <= limits.tokens
            and sum(cost.decoded_bytes for cost in members) <= limits.decoded_bytes
        )


@given(costs, limits)
def test_batches_are_of_similar_sizes_and_no_two_neighbours_fit_into_one(
    costs: list[ImageCost], limits: BatchLimits
) -> None:
    batches = [[costs[place] for place in batch] for batch in plan_batches(costs, limits)]
    for earlier, later in pairwise(batches):
        assert min(earlier) >= max(later)
        joined = [*earlier, later[0]]
        assert (
            len(joined) > limits.images
            or len(joined) * max(joined).tokens > limits.tokens
            or sum(cost.decoded_bytes for cost in joined) > limits.decoded_bytes
        )


def test_padding_counts() -> None:
    sizes = [ImageCost(tokens, 10, 10) for tokens in (10, 100, 10, 10)]
    assert plan_batches(sizes, BatchLimits(images=9, tokens=130, decoded_bytes=2**30)) == [[1], [0, 2, 3]]


def test_images_of_one_size_stand_together() -> None:
    sizes = [ImageCost(4, 20, 30), ImageCost(4, 30, 20), ImageCost(4, 20, 30), ImageCost(4, 30, 20)]
    assert plan_batches(sizes, BatchLimits(images=2, tokens=99, decoded_bytes=2**30)) == [[1, 3], [0, 2]]


@every_family
@pytest.mark.parametrize("size", [(28, 28), (500, 375), (375, 500), (30, 200), (1000, 40), (31, 33), (640, 640)])
def test_the_tokens_are_those_that_the_processor_makes(load_tiny: LoadTiny, size: tuple[int, int]) -> None:
    processor = load_tiny("sdpa").processor
    features = processor(images=[Image.new("RGB", size)], text=[processor.image_token], return_tensors="pt")
    visual = (features["input_ids"] == processor.image_token_id).sum()
    assert token_counter(Processed(processor))(*size) == visual > 0


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_tokens_of_any_size_are_those_of_its_grid(width: int, height: int) -> None:
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 224 * 224})
    count = token_counter(Processed(processor))
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="aspect ratio"):
            count(width, height)
        return
    image = Image.new("RGB", (width, height))
    grid = processor(images=[image], return_tensors="pt")["image_grid_thw"]
    assert count(width, height) == grid.prod() // 4


@pytest.mark.parametrize("model", [FakeModel(), object(), Processed(CLIPImageProcessor()), Processed(object())])
def test_where_the_processor_does_not_count_patches_every_image_costs_the_same(model: object) -> None:
    assert patch_counter(model) is None
    count = token_counter(model)
    assert count(10, 10) == count(4000, 3000)
