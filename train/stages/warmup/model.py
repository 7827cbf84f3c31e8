"""The model of stage 1: the backbone with a pixel decoder, which is not saved."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from cocoa_embed.model.backbone import PatchGeometry
from cocoa_embed.model.forward_inputs import places, with_host_inputs
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.losses import accuracy, mae_loss, mntp_loss
from cocoa_embed.train.stages.reconstruction import (
    bidirectional_model_mask,
    full_model_mask,
    last_hidden_states,
    masked_places,
    masked_token_logits,
)
from cocoa_embed.train.stages.warmup.settings import DEFAULTS, WarmupSettings


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
        :param visual: Where the visual tokens are in ``[B * L]``, int64 ``[visual tokens]``.
        :param attention_mask: In the form of the model's attention implementation, ``[B, 1, L, L]``.
        :param position_ids: ``[3, B, L]``.
        :returns: ``[visual tokens * patches_per_token, patch_width]``, in the order of ``pixel_values``.
        """
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        decoded = self.layer(hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings)
        patches = self.projection(self.norm(decoded.flatten(0, 1).index_select(0, visual)))
        return torch.reshape(patches, (-1, self.geometry.patch_width))


class WarmupModel(nn.Module):
    """The backbone with a pixel decoder: ``loss = mntp + mae_weight * mae``."""

    accepts_loss_kwargs = True
    """The loss is already a mean over the step, so transformers must not divide it by the micro-batches."""

    def __init__(self, model: PreTrainedModel, geometry: PatchGeometry, settings: WarmupSettings = DEFAULTS) -> None:
        super().__init__()
        self.backbone = model
        self.pixel_decoder = PixelDecoder(model, geometry)
        self.settings = settings

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predict what is masked in a batch of ``WarmupCollator``.

        :returns: Logits ``[masked tokens, V]`` and patches ``[masked patches, patch_width]``.
        """
        batch = with_host_inputs(self.backbone, batch)
        mask = bidirectional_model_mask(self.backbone, batch["attention_mask"])  # the pixel decoder is never causal
        own_mask = full_model_mask(self.backbone, batch["attention_mask"])
        hidden_states = last_hidden_states(self.backbone, batch, own_mask)
        logits = masked_token_logits(self.backbone, hidden_states, batch)
        tokens = len(batch["masked_patches"]) // self.pixel_decoder.geometry.patches_per_token
        visual = places(batch["mm_token_type_ids"] == 1, tokens)
        patches = self.pixel_decoder(hidden_states, visual, mask, batch["position_ids"])
        return logits, patches.index_select(0, masked_places(batch, "masked_patches", "target_patches"))

    def forward(self, *, totals: Mapping[str, float | Tensor] | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Return ``loss`` and its parts, scalars, for a batch of the collator.

        :param totals: How many ``target_ids`` and ``target_patches`` the whole step has, if the batch is a part of it.
        """
        totals = totals or {}
        logits, patches = self.predict(batch)
        targets, tokens = batch["target_ids"], totals.get("target_ids")
        mntp = mntp_loss(logits, targets, total=tokens)
        mae = mae_loss(
            patches,
            batch["target_patches"],
            normalise_targets=self.settings.normalise_targets,
            total=totals.get("target_patches"),
        )
        return {
            "loss": mntp + self.settings.mae_weight * mae,
            "mntp_loss": mntp,
            "mae_loss": mae,
            "masked_token_accuracy": accuracy(logits, targets, total=tokens),
        }
