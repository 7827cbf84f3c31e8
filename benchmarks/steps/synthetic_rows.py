"""Rows of random tokens and random pixels, made on the fly, and the batches that each stage makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import PatchGeometry
from cocoa_embed.train.plan.cost import BatchShape

ORDINARY_TOKENS = 150_000
"""Ids below this are no special tokens of Qwen's."""

MEDIAN_TEXT, SPREAD, SHORTEST, LONGEST = 48, 0.8, 8, 384
IMAGE_SHARE = 0.75
TEXT_MASK, IMAGE_MASK, BRIDGE_MASK = 0.2, 0.5, 0.7


@dataclass(frozen=True)
class SyntheticRow:
    """A text of so many tokens and, unless ``side`` is 0, a square image of ``side`` visual tokens a side."""

    text: int
    side: int

    @property
    def length(self) -> int:
        """Tokens of the row with its ``<EOS>``."""
        return self.side**2 + self.text + 1


def draw_rows(count: int, *, sides: tuple[int, int], seed: int) -> list[SyntheticRow]:
    """Draw rows: log-normal texts, and for three rows in four an image of any size within ``sides``."""
    generator = torch.Generator().manual_seed(seed)
    texts = (MEDIAN_TEXT * (SPREAD * torch.randn(count, generator=generator)).exp()).clamp(SHORTEST, LONGEST).int()
    drawn = torch.randint(sides[0], sides[1] + 1, (count,), generator=generator)
    has_image = torch.rand(count, generator=generator) < IMAGE_SHARE
    return [SyntheticRow(*row) for row in zip(texts.tolist(), (drawn * has_image).tolist(), strict=True)]


def make_batch(rows: Sequence[SyntheticRow], config: PreTrainedConfig, stage: str, *, seed: int) -> dict[str, Tensor]:
    """Return a right-padded batch as the stage's collator would, ``<EOS>`` after the text or, for the bridge, in it."""
    generator = torch.Generator().manual_seed(seed)
    merge = PatchGeometry.from_config(config).merge_size
    ids, kinds, blocks = zip(*(_tokens(row, config, stage, generator) for row in rows), strict=True)
    batch = {
        "input_ids": pad_sequence(list(ids), batch_first=True),
        "mm_token_type_ids": pad_sequence(list(kinds), batch_first=True),
    }
    padded_blocks = pad_sequence(list(blocks), batch_first=True, padding_value=Block.PAD)
    batch["attention_mask"] = (padded_blocks != Block.PAD).long()
    grids = [(1, row.side * merge, row.side * merge) for row in rows if row.side]
    if grids:
        batch |= _pixels(grids, config, generator)
    batch["num_images_per_sample"] = torch.tensor([int(row.side > 0) for row in rows])
    if stage == "contrastive":
        return batch
    is_text = (padded_blocks == Block.B) if stage == "bridge" else batch["attention_mask"].bool()
    is_text = is_text & (batch["mm_token_type_ids"] == 0)
    is_text[:, 0] = False
    share = BRIDGE_MASK if stage == "bridge" else TEXT_MASK
    hidden = is_text & (torch.rand(is_text.shape, generator=generator) < share)
    batch |= {"masked_tokens": hidden, "target_ids": batch["input_ids"][hidden]}
    if stage == "bridge":
        return {**batch, "blocks": padded_blocks}
    return batch | (_hidden_patches(batch, merge, generator) if grids else {})


def _tokens(
    row: SyntheticRow, config: PreTrainedConfig, stage: str, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    visual = row.side**2
    ids = torch.randint(1, ORDINARY_TOKENS, (row.length,), generator=generator)
    ids[:visual] = config.image_token_id
    kinds = torch.zeros_like(ids)
    kinds[:visual] = 1
    block_b = row.text // 2 if stage == "bridge" else 0
    blocks = torch.tensor([Block.A] * (row.length - 1 - block_b) + [Block.EOS] + [Block.B] * block_b)
    return ids, kinds, blocks


def _pixels(grids: list[tuple[int, int, int]], config: PreTrainedConfig, generator: Generator) -> dict[str, Tensor]:
    grid = torch.tensor(grids)
    width = PatchGeometry.from_config(config).patch_width
    pixels = torch.randn(int(grid.prod(dim=1).sum()), width, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _hidden_patches(batch: dict[str, Tensor], merge: int, generator: Generator) -> dict[str, Tensor]:
    tokens = len(batch["pixel_values"]) // merge**2
    hidden = (torch.rand(tokens, generator=generator) < IMAGE_MASK).repeat_interleave(merge**2)
    return {"masked_patches": hidden, "target_patches": batch["pixel_values"][hidden]}


def useful_shapes(rows: Sequence[SyntheticRow], config: PreTrainedConfig, stage: str) -> list[BatchShape]:
    """Return each row's shape by itself: the work that has to be done, without padding and with no needless logit."""
    geometry = PatchGeometry.from_config(config)
    shapes = []
    for row in rows:
        share = {"warmup": TEXT_MASK * row.text, "bridge": BRIDGE_MASK * (row.text // 2), "contrastive": 0.0}[stage]
        side = row.side * geometry.merge_size
        shapes.append(
            BatchShape(
                rows=1,
                length=row.length,
                tokens=row.length,
                image_grids=((1, side, side),) if side else (),
                hidden_tokens=round(share),
                hidden_patches=int(IMAGE_MASK * side**2) if stage == "warmup" else 0,
            )
        )
    return shapes
