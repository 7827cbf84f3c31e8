"""Rows of random tokens and pixels, and the batches that each stage would make of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from cocoa_embed.model.attention import Block
from cocoa_embed.model.families.registry import family_of

ORDINARY_TOKENS = 150_000
"""Ids below this are not special tokens in Qwen's vocabularies."""

MEDIAN_TEXT, SPREAD, SHORTEST, LONGEST = 48, 0.8, 8, 384
IMAGE_FRACTION = 0.75
TEXT_MASK_RATIO, IMAGE_MASK_RATIO, BRIDGE_MASK_RATIO = 0.2, 0.5, 0.7


@dataclass(frozen=True)
class SyntheticRow:
    """A text of ``text`` tokens after a square image with ``side`` visual tokens per side; 0 for no image."""

    text: int
    side: int

    @property
    def length(self) -> int:
        """The number of tokens, including ``<EOS>``."""
        return self.side**2 + self.text + 1


def draw_rows(count: int, *, sides: tuple[int, int], seed: int) -> list[SyntheticRow]:
    """Draw rows with log-normal text lengths, three in four with an image whose side is drawn from ``sides``."""
    generator = torch.Generator().manual_seed(seed)
    texts = (MEDIAN_TEXT * (SPREAD * torch.randn(count, generator=generator)).exp()).clamp(SHORTEST, LONGEST).int()
    drawn = torch.randint(sides[0], sides[1] + 1, (count,), generator=generator)
    has_image = torch.rand(count, generator=generator) < IMAGE_FRACTION
    return [SyntheticRow(*row) for row in zip(texts.tolist(), (drawn * has_image).tolist(), strict=True)]


def make_batch(rows: Sequence[SyntheticRow], config: PreTrainedConfig, stage: str, *, seed: int) -> dict[str, Tensor]:
    """Return a right-padded batch like the stage's collator: ``<EOS>`` at the end, in the bridge before block B."""
    generator = torch.Generator().manual_seed(seed)
    geometry = family_of(config).geometry
    ids, blocks = zip(*(_tokens(row, config.image_token_id, stage, generator) for row in rows), strict=True)
    padded_ids = pad_sequence(list(ids), batch_first=True)
    padded_blocks = pad_sequence(list(blocks), batch_first=True, padding_value=Block.PAD)
    is_visual = padded_ids == config.image_token_id
    batch = {
        "input_ids": padded_ids,
        "mm_token_type_ids": is_visual.long(),
        "attention_mask": (padded_blocks != Block.PAD).long(),
        "num_images_per_sample": torch.tensor([int(row.side > 0) for row in rows]),
    }
    sides = torch.tensor([row.side * geometry.merge_size for row in rows if row.side])
    if len(sides):
        pixels = torch.randn(int((sides**2).sum()), geometry.patch_width, generator=generator)
        grids = torch.stack([torch.ones_like(sides), sides, sides], dim=1)
        batch |= {"pixel_values": pixels, "image_grid_thw": grids}
    if stage == "contrastive":
        return batch
    is_bridge = stage == "bridge"
    is_text = (padded_blocks == Block.B) if is_bridge else batch["attention_mask"].bool() & ~is_visual
    is_text[:, 0] = False
    ratio = BRIDGE_MASK_RATIO if is_bridge else TEXT_MASK_RATIO
    masked = is_text & (torch.rand(is_text.shape, generator=generator) < ratio)
    batch |= {"masked_tokens": masked, "target_ids": padded_ids[masked]}
    if is_bridge:
        batch["blocks"] = padded_blocks
    elif len(sides):
        tokens = len(pixels) // geometry.patches_per_token
        masked_tokens = torch.rand(tokens, generator=generator) < IMAGE_MASK_RATIO
        masked_patches = masked_tokens.repeat_interleave(geometry.patches_per_token)
        batch |= {"masked_patches": masked_patches, "target_patches": pixels[masked_patches]}
    return batch


def _tokens(row: SyntheticRow, image_token_id: int, stage: str, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return the ids of a row and the block of each."""
    ids = torch.randint(1, ORDINARY_TOKENS, (row.length,), generator=generator)
    ids[: row.side**2] = image_token_id
    block_b = row.text // 2 if stage == "bridge" else 0
    blocks = [Block.A] * (row.length - 1 - block_b) + [Block.EOS] + [Block.B] * block_b
    return ids, torch.tensor(blocks)
