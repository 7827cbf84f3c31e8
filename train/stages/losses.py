"""The losses of the reconstruction stages: tensors in, scalar out."""

import torch
import torch.nn.functional as F
from torch import Tensor


def own_states(hidden_states: Tensor, masked: Tensor) -> Tensor:
    """Return the states at the masked tokens, which predict them in masked language modelling.

    :param hidden_states: ``[B, L, D]``.
    :param masked: The indices of the masked tokens in ``[B * L]``, int64 ``[masked tokens]``.
    :returns: ``[masked tokens, D]``.
    """
    return hidden_states.flatten(0, 1).index_select(0, masked)


def predicting_states(hidden_states: Tensor, masked: Tensor) -> Tensor:
    """Return the states that predict the masked tokens: the one before each (masked next-token prediction).

    :param hidden_states: ``[B, L, D]``.
    :param masked: The indices of the masked tokens in ``[B * L]``, int64 ``[masked tokens]``; never the first position
        of a row, which has no state before it.
    :returns: ``[masked tokens, D]``.
    """
    return own_states(hidden_states, masked - 1)


def masked_token_loss(logits: Tensor, targets: Tensor, *, total: float | Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy in nats over masked tokens, in float32; zero where none is masked.

    :param logits: ``[masked tokens, V]``, computed only from the states that predict them.
    :param targets: Ids of the masked tokens, int64 ``[masked tokens]``.
    :param total: What the sum is divided by if these are a part of a step's masked tokens; by default their count.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum") / _divisor(total, targets)


def mae_loss(
    predictions: Tensor, patches: Tensor, *, normalise_targets: bool = False, total: float | Tensor | None = None
) -> Tensor:
    """Return the mean squared error over masked raw patches, in float32; zero where none is masked.

    :param predictions: ``[masked patches, patch_width]``.
    :param patches: The raw patches that were masked, ``[masked patches, patch_width]``.
    :param normalise_targets: Give each target patch zero mean and unit variance first (He et al. 2022).
    :param total: What the sum over patches is divided by if these are a part of a step's; by default their count.
    """
    targets = patches.float()
    if normalise_targets:
        targets = (targets - targets.mean(1, keepdim=True)) / (targets.var(1, keepdim=True) + 1e-6).sqrt()
    return F.mse_loss(predictions.float(), targets, reduction="sum") / (_divisor(total, patches) * patches.shape[1])


def eos_similarity(states: Tensor, *, total: float | Tensor | None = None) -> Tensor:
    """Return the mean over rows of the mean squared cosine between two of a row's vectors, in float32.

    :param states: ``[B, K, D]``, of K > 1 vectors a row.
    :param total: What the sum over rows is divided by if these are a part of a step's rows; by default their count.
    """
    rows, count, _ = states.shape
    unit = F.normalize(states.float(), dim=2)
    of_pairs = (unit @ unit.mT).square().sum() - rows * count  # each pair twice, and no vector with itself
    return of_pairs / (count * (count - 1) * _divisor(total, states))


@torch.no_grad()
def accuracy(logits: Tensor, targets: Tensor, *, total: float | Tensor | None = None) -> Tensor:
    """Return the ratio of masked tokens whose most likely prediction is correct; zero where none is masked.

    :param total: As in ``masked_token_loss``.
    """
    return (logits.argmax(dim=-1) == targets).sum() / _divisor(total, targets)


def _divisor(total: float | Tensor | None, parts: Tensor) -> float | Tensor:
    if isinstance(total, Tensor):
        return total.masked_fill(total == 0, 1)
    return (len(parts) if total is None else total) or 1
