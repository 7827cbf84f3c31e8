import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cocoa_embed.train.stages.losses import accuracy, mae_loss, mntp_loss, predicting_states

VOCABULARY = 37


def position_coded(rows: int, length: int) -> Tensor:
    """Return masked states that say where they stand: ``[row, position]`` in two dimensions."""
    row, position = torch.meshgrid(torch.arange(rows), torch.arange(length), indexing="ij")
    return torch.stack([row, position], dim=-1).float()


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_a_masked_token_is_predicted_from_the_state_before_it(rows: list[list[bool]]) -> None:
    masked = torch.tensor([[False, *row] for row in rows])
    states = predicting_states(position_coded(*masked.shape), masked)
    expected = [[row, position - 1] for row, position in masked.nonzero().tolist()]
    assert states.tolist() == expected


def test_the_states_stand_in_the_order_of_the_targets() -> None:
    input_ids = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    masked = torch.tensor([[False, True, False, True], [False, False, True, False]])
    states = predicting_states(input_ids[..., None], masked)
    assert (states[:, 0] + 1).tolist() == input_ids[masked].tolist()


def test_a_masked_first_token_is_refused() -> None:
    masked = torch.tensor([[False, True], [True, False]])
    with pytest.raises(ValueError, match="first token of a row"):
        predicting_states(position_coded(2, 2), masked)


@settings(deadline=None, max_examples=20)
@given(vocabulary=st.integers(2, 500), tokens=st.integers(1, 9), level=st.floats(-5, 5))
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(vocabulary: int, tokens: int, level: float) -> None:
    targets = torch.arange(tokens) % vocabulary
    loss = mntp_loss(torch.full((tokens, vocabulary), level), targets)
    assert loss.item() == pytest.approx(math.log(vocabulary), rel=1e-5)


def test_certain_and_right_costs_nothing_certain_and_wrong_costs_the_margin() -> None:
    targets = torch.tensor([3, 0, 7])
    logits = torch.nn.functional.one_hot(targets, VOCABULARY) * 50.0
    assert mntp_loss(logits, targets).item() == pytest.approx(0, abs=1e-6)
    assert mntp_loss(logits, (targets + 1) % VOCABULARY).item() == pytest.approx(50, rel=1e-5)


def test_mntp_is_computed_in_float32() -> None:
    assert mntp_loss(torch.zeros(2, VOCABULARY, dtype=torch.bfloat16), torch.tensor([0, 1])).dtype == torch.float32


def test_a_mismatch_of_counts_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="5 rows of logits for 3 masked tokens"):
        mntp_loss(torch.zeros(5, VOCABULARY), torch.tensor([0, 1, 2]))


def test_mae_is_zero_for_the_patches_themselves_and_the_mean_square_for_zero() -> None:
    patches = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    assert mae_loss(patches, patches).item() == 0
    assert mae_loss(torch.zeros_like(patches), patches).item() == pytest.approx(patches.square().mean().item())


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(0.1, 100), shift=st.floats(-50, 50))
def test_normalised_targets_have_unit_variance_whatever_the_patch(scale: float, shift: float) -> None:
    width = 48
    patches = torch.randn(6, width, generator=torch.Generator().manual_seed(0)) * scale + shift
    loss = mae_loss(torch.zeros_like(patches), patches, normalise_targets=True)
    assert loss.item() == pytest.approx((width - 1) / width, rel=1e-3)
    assert mae_loss(torch.zeros_like(patches), patches).item() == pytest.approx(patches.square().mean().item())


def test_normalised_targets_of_a_flat_patch_are_finite() -> None:
    flat = torch.full((2, 48), 3.0)
    assert mae_loss(torch.zeros_like(flat), flat, normalise_targets=True).item() == pytest.approx(0, abs=1e-6)


def test_patches_of_another_shape_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"predictions \(4, 8\) for patches \(1, 8\)"):
        mae_loss(torch.zeros(4, 8), torch.zeros(1, 8))


def test_accuracy_is_the_ratio_of_correct_predictions() -> None:
    targets = torch.tensor([0, 1, 2, 3])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0]), VOCABULARY).float().requires_grad_()
    ratio = accuracy(logits, targets)
    assert ratio.item() == 0.75
    assert not ratio.requires_grad
