import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_embed.train.stages.losses import accuracy, mae_loss, masked_token_loss, predicting_states

VOCABULARY = 37


@settings(max_examples=60)
@given(rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_a_masked_token_is_predicted_from_the_state_before_it(rows: list[list[bool]]) -> None:
    masked = torch.tensor([[False, *row] for row in rows])
    input_ids = torch.arange(masked.numel()).view_as(masked)
    states = predicting_states(input_ids[..., None], masked.flatten().nonzero().flatten())
    assert (states[:, 0] + 1).tolist() == input_ids[masked].tolist()


@settings(max_examples=20)
@given(vocabulary=st.integers(2, 500), tokens=st.integers(1, 9), level=st.floats(-5, 5))
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(vocabulary: int, tokens: int, level: float) -> None:
    logits = torch.full((tokens, vocabulary), level, dtype=torch.bfloat16)
    loss = masked_token_loss(logits, torch.arange(tokens) % vocabulary)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(vocabulary), rel=1e-5)


def test_certain_predictions_cost_nothing_if_correct_and_the_margin_if_wrong() -> None:
    targets = torch.tensor([3, 0, 7])
    logits = torch.nn.functional.one_hot(targets, VOCABULARY) * 50.0
    assert masked_token_loss(logits, targets).item() == pytest.approx(0, abs=1e-6)
    assert masked_token_loss(logits, (targets + 1) % VOCABULARY).item() == pytest.approx(50, rel=1e-5)


@settings(max_examples=20)
@given(scale=st.floats(0.1, 100), shift=st.floats(-50, 50))
def test_mae_is_the_mean_square_and_that_of_unit_variance_for_normalised_targets(scale: float, shift: float) -> None:
    width = 48
    patches = torch.randn(6, width, generator=torch.Generator().manual_seed(0)) * scale + shift
    nothing = torch.zeros_like(patches)
    assert mae_loss(patches, patches).item() == 0
    assert mae_loss(nothing, patches).item() == pytest.approx(patches.square().mean().item())
    assert mae_loss(nothing, patches, normalise_targets=True).item() == pytest.approx((width - 1) / width, rel=1e-3)
    flat = torch.full((2, width), shift)
    assert mae_loss(nothing[:2], flat, normalise_targets=True).item() == pytest.approx(0, abs=1e-3), "and finite"


def test_accuracy_is_the_ratio_of_correct_predictions() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0]), VOCABULARY).float().requires_grad_()
    ratio = accuracy(logits, torch.tensor([0, 1, 2, 3]))
    assert ratio.item() == 0.75
    assert not ratio.requires_grad
