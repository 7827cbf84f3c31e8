"""The decoder of stage 1's masked auto-encoding, which is not saved."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from cocoa_embed.model.backbone import PatchGeometry


class PixelDecoder(nn.Module):
    """One decoder layer of the language model, then a projection from each visual token to its raw patches.

    The layer starts as a copy of the language model's middle layer and attends bidirectionally.

    :param model: The backbone whose middle layer is copied.
    :param geometry: How many raw patches stand behind a visual token, and how wide each is.
    """

    def __init__(self, model: PreTrainedModel, geometry: PatchGeometry) -> None:
        super().__init__()
        decoder: Any = model.get_decoder()
        self.geometry = geometry
        self.layer = copy.deepcopy(decoder.layers[len(decoder.layers) // 2])
        self.norm = copy.deepcopy(decoder.norm)
        self.rotary_emb = copy.deepcopy(decoder.rotary_emb)
        self.projection = nn.Linear(
            decoder.config.hidden_size, geometry.patches_per_token * geometry.patch_width, dtype=model.dtype
        )
        nn.init.normal_(self.projection.weight, std=decoder.config.initializer_range)
        nn.init.zeros_(self.projection.bias)

    def forward(
        self, hidden_states: Tensor, visual: Tensor, attention_mask: Tensor | BlockMask, position_ids: Tensor
    ) -> Tensor:
        """Predict the raw patches behind every visual token.

        :param hidden_states: Last hidden states of the language model, ``[B, L, D]``.
        :param visual: Positions of the visual tokens, bool ``[B, L]``.
        :param attention_mask: In the form of the model's attention implementation, ``[B, 1, L, L]``.
        :param position_ids: ``[3, B, L]``.
        :returns: ``[visual tokens * patches_per_token, patch_width]``, in the order of ``pixel_values``.
        """
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        decoded = self.layer(hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings)
        patches = self.projection(self.norm(decoded[visual]))
        return torch.reshape(patches, (-1, self.geometry.patch_width))
