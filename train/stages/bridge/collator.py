"""Collate rows into batches of stage 2: ``[block A] <EOS> [block B]``, with most of block B masked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import RowError
from cocoa_embed.model.attention import Block
from cocoa_embed.model.template import eos_tokens, literal, special_tokens
from cocoa_embed.train.data.rows import Example
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.bridge.settings import Split
from cocoa_embed.train.stages.masking import draw_prefixes, mask_ratio, row_generators
from cocoa_embed.train.stages.rendering import is_special, render_items, replace_masked, row_images, text_tokens

NO_CONTENT = (
    "the row has no text besides its instructions, and the bridge stage needs one for block B; caption its image."
)

LONG_TEXT_WORDS = 32
"""The fewest words of a text that ``split: halves`` cuts in two."""


@dataclass(frozen=True)
class BridgeCollator:
    """Put the two blocks of a row around ``<EOS>`` and mask a ratio of block B's tokens.

    Adds to ``render_items``: ``blocks`` (``Block``, int64 ``[B, L]``), ``masked_tokens`` (bool ``[B, L]``) and
    ``target_ids`` (int64 ``[masked tokens]``). If there are several ``<EOS>``, block B sees a random prefix of them,
    whose length is in ``target_prefixes`` (int64 ``[B]``).
    """

    processor: ProcessorMixin
    seed: int
    mask_ratio: float = 0.7
    split: Split = "whole"

    def __call__(self, examples: list[Example]) -> Batch:
        """Collate rows with their draws.

        :raises RowError: If a row has no text for block B.
        """
        generators = row_generators(self.seed, [draw for draw, _ in examples])
        tokenizer = self.processor.tokenizer
        max_length, special = tokenizer.model_max_length, special_tokens(tokenizer)
        count = len(eos_tokens(tokenizer))
        pairs = [split_blocks(row, self.split) for _, row in examples]
        block_a = render_items(self.processor, [item for item, _ in pairs])
        block_b = tokenizer(
            [literal(text, special) for _, text in pairs],
            add_special_tokens=False,
            truncation=True,
            max_length=max_length,
        )
        rows = [
            join_blocks(ids[keep], kinds[keep], is_text[keep], torch.tensor(tail, dtype=torch.long), max_length, count)
            for ids, kinds, is_text, keep, tail in zip(
                block_a["input_ids"],
                block_a["mm_token_type_ids"],
                text_tokens(block_a, self.processor),
                block_a["attention_mask"].bool(),
                block_b["input_ids"],
                strict=True,
            )
        ]
        ids, kinds, blocks = zip(*rows, strict=True)
        padded_blocks = _pad(blocks, Block.PAD)
        batch = {
            **block_a,
            "input_ids": _pad(ids, tokenizer.pad_token_id),
            "mm_token_type_ids": _pad(kinds, 0),
            "attention_mask": (padded_blocks != Block.PAD).long(),
            "blocks": padded_blocks,
        }
        eligible = (padded_blocks == Block.B) & ~is_special(batch["input_ids"], self.processor)
        batch = replace_masked(batch, mask_ratio(eligible, self.mask_ratio, generators), tokenizer.mask_token_id)
        if count > 1:
            batch["blocks"], batch["target_prefixes"] = draw_prefixes(padded_blocks, count, generators)
        return batch


def split_blocks(row: Row, split: Split = "whole") -> tuple[Item, str]:
    """Return block A's item and block B's text.

    Block B is the whole content of the side that has more of it; it is the positive's if both sides have equally much,
    and in a row without images. Block A is the rest: the images of both sides, and the other side's instruction and
    content. If the side of block B has an image, its instruction comes before those.

    :param split: ``halves`` makes both blocks of block B's text, if the row has no image and the text is long.
    :raises RowError: If the row has no content text.
    """
    images = row_images(row)
    with_b, other = row.positive, row.query
    if images and len(other.text or "") > len(with_b.text or ""):
        with_b, other = other, with_b
    if with_b.text is None:
        raise RowError(row.source, NO_CONTENT)
    words = with_b.text.split()
    if split == "halves" and not images and len(words) >= LONG_TEXT_WORDS:
        middle = len(words) // 2
        return replace(with_b, text=" ".join(words[:middle])), " ".join(words[middle:])
    instructions = (with_b.instruction if with_b.images else None, other.instruction)
    return Item(other.text, images, "".join(filter(None, instructions)) or None), with_b.text


def join_blocks(
    input_ids: Tensor, token_types: Tensor, is_text: Tensor, tail: Tensor, max_length: int, count: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Append block B's tokens after a row's ``count`` ``<EOS>``, within ``max_length`` tokens.

    If both blocks do not fit, block A's text is cut until a quarter of ``max_length`` is left for block B; visual
    tokens and ``<EOS>`` stay. Block B is cut to the tokens that are left.

    :param input_ids: Block A and ``<EOS>``, int64 ``[length]``.
    :param token_types: Its ``mm_token_type_ids``, int64 ``[length]``.
    :param is_text: Its ordinary text tokens, bool ``[length]``.
    :param tail: Block B, int64 ``[tokens]``.
    :returns: ids, token types and ``Block`` of every position, int64 ``[joined length]``.
    """
    excess = len(input_ids) + min(len(tail), max_length // 4) - max_length
    text_positions = is_text.nonzero().flatten()
    keep = torch.ones_like(is_text)
    keep[text_positions[len(text_positions) - max(0, min(excess, len(text_positions))) :]] = False
    input_ids, token_types = input_ids[keep], token_types[keep]
    tail = tail[: max_length - len(input_ids)]
    blocks = torch.tensor([Block.A] * (len(input_ids) - count) + [Block.EOS] * count + [Block.B] * len(tail))
    return torch.cat([input_ids, tail]), torch.cat([token_types, torch.zeros_like(tail)]), blocks


def _pad(rows: Sequence[Tensor], value: float) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)
