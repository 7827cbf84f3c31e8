import math
from collections.abc import Callable
from typing import TypeAlias, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from cocoa_embed.train.stages.masking import PatchFill, fill_patches, mask_each, mask_ratio, mask_visual_tokens

Mask: TypeAlias = Callable[[Tensor, float, list[Generator]], Tensor]


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def eligibles(draw: st.DrawFn) -> Tensor:
    width = draw(st.integers(1, 12))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=5)))


@settings(max_examples=60)
@given(eligible=eligibles(), probability=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_mask_each_masks_only_eligible_tokens_and_at_least_one(eligible: Tensor, probability: float, seed: int) -> None:
    masked = mask_each(eligible, probability, [seeded(seed)] * len(eligible))
    assert not (masked & ~eligible).any()
    assert torch.equal(masked.any(dim=1), eligible.any(dim=1))


def test_mask_each_masks_with_the_probability() -> None:
    probability, tokens = 0.2, 200 * 100
    masked = mask_each(torch.ones(200, 100, dtype=torch.bool), probability, [seeded()] * 200)
    deviation = math.sqrt(probability * (1 - probability) / tokens)
    assert abs(masked.float().mean().item() - probability) < 5 * deviation
    assert len(masked.sum(dim=1).unique()) > 5, "tokens are drawn one by one, so the counts of rows differ"
    assert abs(masked.float().mean(dim=0) - probability).max() < 5 * math.sqrt(probability * (1 - probability) / 200)


@settings(max_examples=80)
@given(eligible=eligibles(), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 2**32))
def test_mask_ratio_masks_the_rounded_ratio_of_each_row(eligible: Tensor, ratio: float, seed: int) -> None:
    masked = mask_ratio(eligible, ratio, [seeded(seed)] * len(eligible))
    assert not (masked & ~eligible).any()
    assert torch.equal(masked.any(dim=1), eligible.any(dim=1))
    for count, of in zip(masked.sum(dim=1).tolist(), eligible.sum(dim=1).tolist(), strict=True):
        assert count == 1 or abs(count - ratio * of) <= 0.5 + 1e-4


def test_mask_ratio_chooses_every_position_equally_often() -> None:
    masked = mask_ratio(torch.ones(4000, 8, dtype=torch.bool), 0.5, [seeded()] * 4000)
    assert (masked.sum(dim=1) == 4).all()
    assert abs(masked.float().mean(dim=0) - 0.5).max() < 5 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize("mask", [mask_each, mask_ratio])
def test_a_rows_mask_depends_only_on_its_own_generator(mask: Mask) -> None:
    padded = torch.nn.functional.pad(torch.ones(3, 30, dtype=torch.bool), (0, 10))
    torch.manual_seed(1)
    together = mask(padded, 0.5, [seeded(1), seeded(2), seeded(3)])
    torch.manual_seed(2)
    alone = [mask(padded[:1, :30], 0.5, [seeded(seed)]) for seed in (1, 2, 3)]
    assert torch.equal(together[:, :30], torch.cat(alone))
    assert len({tuple(row) for row in together.tolist()}) == 3


@settings(max_examples=50)
@given(tokens=st.lists(st.integers(1, 30), max_size=6), seed=st.integers(0, 2**32))
def test_each_image_is_masked_by_the_ratio_of_its_own_tokens(tokens: list[int], seed: int) -> None:
    masked = mask_visual_tokens(torch.tensor(tokens, dtype=torch.long), 0.5, [seeded(seed)] * len(tokens))
    assert len(masked) == sum(tokens)
    counts = [image.sum().item() for image in masked.split(tokens)] if tokens else []
    assert counts == [max(1, round(0.5 * count)) for count in tokens]


@settings(max_examples=40)
@given(masked=st.lists(st.booleans(), min_size=1, max_size=12), fill=st.sampled_from(get_args(PatchFill)))
def test_patches_that_are_not_masked_stay_bit_identical(masked: list[bool], fill: PatchFill) -> None:
    patches = torch.randn(len(masked), 24, generator=seeded(3))
    before, which = patches.clone(), torch.tensor(masked)
    filled = fill_patches(patches, which, fill, [len(masked)], [seeded()])
    assert torch.equal(patches, before), "the given patches are not changed"
    assert torch.equal(filled[~which], patches[~which])
    assert (filled[which] != patches[which]).any(dim=1).all()


def test_noise_is_drawn_anew_for_every_patch_and_every_batch() -> None:
    patches, every = torch.full((20, 600), 9.0), torch.ones(20, dtype=torch.bool)
    generator = seeded()
    noise = torch.cat([fill_patches(patches, every, "noise", [10, 10], [generator] * 2) for _ in range(2)])
    assert torch.cdist(noise, noise).fill_diagonal_(torch.inf).min() > 1
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize(("fill", "expected"), [("zero", [[0, 0], [0, 0], [2, 4]]), ("mean", [[2, 2], [7, 7], [2, 4]])])
def test_masked_patches_are_filled_with_zero_or_their_mean(fill: PatchFill, expected: list[list[float]]) -> None:
    patches, which = torch.tensor([[1.0, 3.0], [5.0, 9.0], [2.0, 4.0]]), torch.tensor([True, True, False])
    assert fill_patches(patches, which, fill, [3], [seeded()]).tolist() == expected
