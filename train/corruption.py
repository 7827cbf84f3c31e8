"""Hide tokens and patches: pure functions of their arguments and an explicit generator."""

from typing import Literal

import torch
from torch import Generator, Tensor

PatchFill = Literal["noise", "zero", "mean"]


def hide_each(eligible: Tensor, probability: float, generator: Generator) -> Tensor:
    """Hide each eligible token with ``probability``, and at least one in a row that has any.

    :param eligible: Tokens that may be hidden, bool ``[B, L]``.
    :returns: Hidden tokens, bool ``[B, L]``, a subset of ``eligible``.
    """
    draw = torch.rand(eligible.shape, generator=generator).masked_fill(~eligible, torch.inf)
    lowest = torch.zeros_like(eligible)
    lowest[torch.arange(len(eligible)), draw.argmin(dim=1)] = True
    return ((draw < probability) | lowest) & eligible


def hide_share(eligible: Tensor, share: float, generator: Generator) -> Tensor:
    """Hide ``share`` of each row's eligible positions, rounded, and at least one in a row that has any.

    :param eligible: Positions that may be hidden, bool ``[B, L]``.
    :returns: Hidden positions, bool ``[B, L]``, a subset of ``eligible``.
    """
    counts = eligible.sum(dim=1)
    wanted = (counts * share).round().long().clamp(min=1).minimum(counts)
    draw = torch.rand(eligible.shape, generator=generator).masked_fill(~eligible, torch.inf)
    rank = draw.argsort(dim=1).argsort(dim=1)
    return (rank < wanted[:, None]) & eligible


def hide_visual_tokens(tokens_per_image: Tensor, share: float, generator: Generator) -> Tensor:
    """Hide ``share`` of the visual tokens of each image.

    :param tokens_per_image: int64 ``[images]``.
    :returns: bool ``[sum(tokens_per_image)]``, in the order of the images and of the tokens in each.
    """
    width = int(tokens_per_image.max()) if len(tokens_per_image) else 0
    exists = torch.arange(width)[None, :] < tokens_per_image[:, None]
    return hide_share(exists, share, generator)[exists]


def fill_patches(pixel_values: Tensor, hidden: Tensor, fill: PatchFill, generator: Generator) -> Tensor:
    """Replace hidden raw patches before the vision encoder sees them.

    ``noise`` is drawn anew for every patch from a standard normal, the scale that image processors normalise pixels
    to; ``zero`` is that scale's middle; ``mean`` is each patch's own mean, so that only its detail is hidden.

    :param pixel_values: Raw patches, float ``[patches, patch_width]``.
    :param hidden: bool ``[patches]``.
    :returns: A changed copy.
    """
    if fill == "noise":
        filling = torch.randn(pixel_values.shape, generator=generator, dtype=pixel_values.dtype)
    elif fill == "zero":
        filling = torch.zeros_like(pixel_values)
    elif fill == "mean":
        filling = pixel_values.mean(dim=1, keepdim=True).expand_as(pixel_values)
    else:
        raise ValueError(f"unknown patch fill {fill!r}; use noise, zero or mean")
    return torch.where(hidden[:, None], filling, pixel_values)
