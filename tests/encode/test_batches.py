from itertools import pairwise

import pytest
from fake_model import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, Qwen2VLImageProcessor

from cocoa_embed.encode.batches import BatchLimits, ImageCost, plan_batches, token_counter

sides = st.integers(1, 6000)
costs = st.lists(st.builds(ImageCost, tokens=st.integers(1, 2000), width=sides, height=sides), max_size=60)
limits = st.builds(
    BatchLimits, images=st.integers(1, 40), tokens=st.integers(1, 4000), decoded_bytes=st.integers(1, 2**27)
)


class Processed:
    """Stands for a model with a real processor."""

    def __init__(self, processor: object) -> None:
        self.processor = processor


@given(costs, limits)
def test_batches_hold_every_image_once_within_the_limits_sorted_and_as_few_as_possible(
    costs: list[ImageCost], limits: BatchLimits
) -> None:
    def fits(members: list[ImageCost]) -> bool:
        return (
            len(members) <= limits.images
            and len(members) * max(cost.tokens for cost in members) <= limits.tokens
            and sum(cost.decoded_bytes for cost in members) <= limits.decoded_bytes
        )

    planned = plan_batches(costs, limits)
    assert sorted(index for batch in planned for index in batch) == list(range(len(costs)))
    batches = [[costs[index] for index in batch] for batch in planned]
    assert all(len(batch) == 1 or fits(batch) for batch in batches), "only one large image exceeds a limit"
    for earlier, later in pairwise(batches):
        assert min(earlier) >= max(later)
        assert not fits([*earlier, later[0]])


@settings(max_examples=60)
@given(st.sampled_from([14, 16]), st.integers(1, 1000), st.integers(1, 1000))
def test_the_tokens_of_any_size_are_those_of_its_grid(patch_size: int, width: int, height: int) -> None:
    size = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}
    processor = Qwen2VLImageProcessor(size=size, patch_size=patch_size)
    count = token_counter(Processed(processor))
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="aspect ratio"):
            count(width, height)
        return
    grid = processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")["image_grid_thw"]
    assert count(width, height) == grid.prod() // 4 > 0


@pytest.mark.parametrize("model", [FakeModel(), object(), Processed(CLIPImageProcessor()), Processed(object())])
def test_every_image_costs_the_same_if_the_processor_counts_no_patches(model: object) -> None:
    count = token_counter(model)
    assert count(10, 10) == count(4000, 3000) == 1
