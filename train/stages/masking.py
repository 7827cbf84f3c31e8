"""Hide tokens and patches: pure functions of their arguments and explicit generators, one for each row.

What is hidden of a row depends on its own generator alone: not on the other rows of the batch, nor on its padding.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

PatchFill = Literal["noise", "zero", "mean"]


def draw_uniform(eligible: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Draw from [0, 1) at each eligible position, each row from its own generator: float ``[B, L]``, inf elsewhere."""
    draw = torch.full(eligible.shape, torch.inf)
    for row, (positions, generator) in enumerate(zip(eligible, generators, strict=True)):
        draw[row, positions] = torch.rand(int(positions.sum()), generator=generator)
    return draw


def hide_each(eligible: Tensor, probability: float, generators: Sequence[Generator]) -> Tensor:
    """Hide each eligible token with ``probability``, and at least one in a row that has any.

    :param eligible: Tokens that may be hidden, bool ``[B, L]``.
    :returns: Hidden tokens, bool ``[B, L]``, a subset of ``eligible``.
    """
    draw = draw_uniform(eligible, generators)
    lowest = torch.zeros_like(eligible)
    lowest[torch.arange(len(eligible)), draw.argmin(dim=1)] = True
    return ((draw < probability) | lowest) & eligible


def hide_share(eligible: Tensor, share: float, generators: Sequence[Generator]) -> Tensor:
    """Hide ``share`` of each row's eligible positions, rounded, and at least one in a row that has any.

    :param eligible: Positions that may be hidden, bool ``[B, L]``.
    :returns: Hidden positions, bool ``[B, L]``, a subset of ``eligible``.
    """
    counts = eligible.sum(dim=1)
    wanted = (counts * share).round().long().clamp(min=1).minimum(counts)
    rank = draw_uniform(eligible, generators).argsort(dim=1).argsort(dim=1)
    return (rank < wanted[:, None]) & eligible


def hide_visual_tokens(tokens_per_image: Tensor, share: float, generators: Sequence[Generator]) -> Tensor:
    """Hide ``share`` of the visual tokens of each image.

    :param tokens_per_image: int64 ``[images]``.
    :param generators: One for each image.
    :returns: bool ``[sum(tokens_per_image)]``, in the order of the images and of the tokens in each.
    """
    width = int(tokens_per_image.max()) if len(tokens_per_image) else 0
    exists = torch.arange(width)[None, :] < tokens_per_image[:, None]
    return hide_share(exists, share, generators)[exists]


def fill_patches(
    pixel_values: Tensor,
    hidden: Tensor,
    fill: PatchFill,
    patches_per_image: Sequence[int],
    generators: Sequence[Generator],
) -> Tensor:
    """Replace hidden raw patches before the vision encoder sees them.

    ``noise`` is drawn anew for every patch from a standard normal, the scale that image processors normalise pixels
    to; ``zero`` is that scale's middle; ``mean`` is each patch's own mean, so that only its detail is hidden.

    :param pixel_values: Raw patches, float ``[patches, patch_width]``.
    :param hidden: bool ``[patches]``.
    :param generators: One for each image.
    :returns: A changed copy.
    """
    filled = pixel_values.clone()
    if fill == "noise":
        of_images = hidden.split(list(patches_per_image))
        shapes = [(int(of_image.sum()), pixel_values.shape[1]) for of_image in of_images]
        noise = [torch.randn(shape, generator=own) for shape, own in zip(shapes, generators, strict=True)]
        filled[hidden] = torch.cat(noise).to(pixel_values.dtype)
    elif fill == "zero":
        filled[hidden] = 0
    elif fill == "mean":
        filled[hidden] = pixel_values[hidden].mean(dim=1, keepdim=True).expand(-1, pixel_values.shape[1])
    else:
        raise ValueError(f"unknown patch fill {fill!r}; use noise, zero or mean")
    return filled
