"""Choose which tokens and patches to mask, and fill masked patches: pure functions of explicit generators.

There is one generator per row: what is masked of a row depends neither on the rest of its batch nor on padding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from cocoa_embed.model.attention import Block
from cocoa_embed.train.data.rows import Draw
from cocoa_embed.train.stages.warmup.settings import PatchFill


def row_generators(seed: int, draws: Sequence[Draw]) -> list[Generator]:
    """Return a generator per row that depends only on the seed and the row's draw, not on batch, worker or device."""
    states = [np.random.SeedSequence([seed, *draw]).generate_state(1, dtype=np.uint64)[0] for draw in draws]
    return [torch.Generator().manual_seed(int(state) >> 1) for state in states]


def draw_uniform(eligible: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Draw from [0, 1) at each eligible position, each row from its own generator: float ``[B, L]``, inf elsewhere."""
    draw = torch.full(eligible.shape, torch.inf)
    for row, (positions, generator) in enumerate(zip(eligible, generators, strict=True)):
        draw[row, positions] = torch.rand(int(positions.sum()), generator=generator)
    return draw


def mask_each(eligible: Tensor, probability: Tensor | float, generators: Sequence[Generator]) -> Tensor:
    """Mask each eligible token with its ``probability``, and at least one in a row that has any.

    :param eligible: Tokens that may be masked, bool ``[B, L]``.
    :param probability: Above 0; one for all tokens, or one for each, float ``[B, L]``.
    :returns: Masked tokens, bool ``[B, L]``, a subset of ``eligible``.
    """
    draw = draw_uniform(eligible, generators)
    lowest = torch.zeros_like(eligible)
    lowest[torch.arange(len(eligible)), (draw / probability).argmin(dim=1)] = True
    return ((draw < probability) | lowest) & eligible


def mask_ratio(eligible: Tensor, ratio: float, generators: Sequence[Generator]) -> Tensor:
    """Mask a ratio of each row's eligible positions, rounded, and at least one in a row that has any.

    :param eligible: Positions that may be masked, bool ``[B, L]``.
    :returns: Masked positions, bool ``[B, L]``, a subset of ``eligible``.
    """
    counts = eligible.sum(dim=1)
    wanted = (counts * ratio).round().long().clamp(min=1).minimum(counts)
    rank = draw_uniform(eligible, generators).argsort(dim=1).argsort(dim=1)
    return (rank < wanted[:, None]) & eligible


def draw_prefixes(blocks: Tensor, count: int, generators: Sequence[Generator]) -> tuple[Tensor, Tensor]:
    """Let block B see a prefix of a row's ``<EOS>``, with a length drawn uniformly from 1 to ``count``.

    :param blocks: ``Block`` of every position, int64 ``[B, L]``, with ``count`` ``<EOS>`` per row. A prefix starts at
        the last of them.
    :returns: The blocks, with the ``<EOS>`` outside the prefix unseen, and the length of each prefix, int64 ``[B]``.
    """
    lengths = torch.stack([torch.randint(1, count + 1, (), generator=own) for own in generators])
    is_eos = blocks == Block.EOS
    number = is_eos.flip(1).cumsum(1).flip(1)
    return blocks.masked_fill(is_eos & (number > lengths[:, None]), Block.UNSEEN), lengths


def visual_places(tokens_per_image: Tensor) -> Tensor:
    """Return which entries of a table with one row per image are visual tokens: bool ``[images, most tokens]``.

    :param tokens_per_image: int64 ``[images]``, of one image or more.
    """
    return torch.arange(int(tokens_per_image.max()))[None, :] < tokens_per_image[:, None]


def fill_patches(
    pixel_values: Tensor,
    masked: Tensor,
    fill: PatchFill,
    patches_per_image: Sequence[int],
    generators: Sequence[Generator],
) -> Tensor:
    """Replace masked raw patches before the vision encoder sees them.

    ``noise`` is drawn separately for every patch from a standard normal, the scale that image processors normalise
    pixels to; ``zero`` is the middle of that scale; ``mean`` is each patch's own mean, so that only detail is masked.

    :param pixel_values: Raw patches, float ``[patches, patch_width]``.
    :param masked: bool ``[patches]``.
    :param generators: One per image.
    :returns: A changed copy.
    """
    filled = pixel_values.clone()
    if fill == "noise":
        of_images = masked.split(list(patches_per_image))
        shapes = [(int(of_image.sum()), pixel_values.shape[1]) for of_image in of_images]
        noise = [torch.randn(shape, generator=own) for shape, own in zip(shapes, generators, strict=True)]
        filled[masked] = torch.cat(noise).to(pixel_values.dtype)
    elif fill == "zero":
        filled[masked] = 0
    else:
        filled[masked] = pixel_values[masked].mean(dim=1, keepdim=True).expand(-1, pixel_values.shape[1])
    return filled


def share_noise(
    pixel_values: Tensor, masked: Tensor, patches_per_image: Sequence[int], generators: Sequence[Generator]
) -> Tensor:
    """Replace all masked raw patches of a row with one patch drawn from a standard normal, a different one per row.

    :param pixel_values: Raw patches, float ``[patches, patch_width]``.
    :param masked: bool ``[patches]``.
    :param generators: One for each image: that of its row.
    :returns: A changed copy.
    """
    noise = {own: torch.randn(pixel_values.shape[1], generator=own) for own in dict.fromkeys(generators)}
    counts = torch.stack([of_image.sum() for of_image in masked.split(list(patches_per_image))])
    filled = pixel_values.clone()
    filled[masked] = torch.stack([noise[own] for own in generators]).repeat_interleave(counts, 0).to(filled.dtype)
    return filled
