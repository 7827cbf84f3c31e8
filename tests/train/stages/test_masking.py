import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from cocoa_embed.train.stages.masking import PatchFill, fill_patches, mask_each, mask_ratio


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def eligibles(draw: st.DrawFn) -> Tensor:
    width = draw(st.integers(1, 12))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=5)))


@settings(max_examples=80)
@given(eligible=eligibles(), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 2**32))
def test_eligible_positions_alone_are_masked_at_least_one_or_their_rounded_ratio(
    eligible: Tensor, ratio: float, seed: int
) -> None:
    each, masked = (mask(eligible, ratio, [seeded(seed)] * len(eligible)) for mask in (mask_each, mask_ratio))
    for found in (each, masked):
        assert not (found & ~eligible).any()
        assert torch.equal(found.any(dim=1), eligible.any(dim=1))
    of_each = mask_each(eligible, torch.full(eligible.shape, ratio), [seeded(seed)] * len(eligible))
    assert torch.equal(of_each, each), "one ratio, and that of every token"
    for count, of in zip(masked.sum(dim=1).tolist(), eligible.sum(dim=1).tolist(), strict=True):
        assert count == 1 or abs(count - ratio * of) <= 0.5 + 1e-4


def test_mask_each_masks_with_the_probability() -> None:
    probability, tokens = 0.2, 200 * 100
    masked = mask_each(torch.ones(200, 100, dtype=torch.bool), probability, [seeded()] * 200)
    deviation = math.sqrt(probability * (1 - probability) / tokens)
    assert abs(masked.float().mean().item() - probability) < 5 * deviation
    assert len(masked.sum(dim=1).unique()) > 5, "tokens are drawn one by one, so the counts of rows differ"
    assert abs(masked.float().mean(dim=0) - probability).max() < 5 * math.sqrt(probability * (1 - probability) / 200)


def test_mask_ratio_chooses_every_position_equally_often() -> None:
    masked = mask_ratio(torch.ones(4000, 8, dtype=torch.bool), 0.5, [seeded()] * 4000)
    assert (masked.sum(dim=1) == 4).all()
    assert abs(masked.float().mean(dim=0) - 0.5).max() < 5 * math.sqrt(0.25 / 4000)


@settings(max_examples=40)
@given(masked=st.lists(st.booleans(), min_size=1, max_size=12), fill=st.sampled_from(get_args(PatchFill)))
def test_patches_that_are_not_masked_stay_bit_identical(masked: list[bool], fill: PatchFill) -> None:
    patches = torch.randn(len(masked), 24, generator=seeded(3))
    before, which = patches.clone(), torch.tensor(masked)
    filled = fill_patches(patches, which, fill, [len(masked)], [seeded()])
    assert torch.equal(patches, before), "the given patches are not changed"
    if fill != "mean":
        covered = fill_patches(patches + which[:, None], which, fill, [len(masked)], [seeded()])
        assert torch.equal(covered, filled), "nothing is left of what is masked"
    assert torch.equal(filled[~which], patches[~which])
    assert (filled[which] != patches[which]).any(dim=1).all()


def test_noise_is_drawn_separately_for_every_patch_and_every_batch() -> None:
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
