"""The model of a joint reconstruction: the backbone with a pixel decoder, which is not saved."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.forward_inputs import with_host_inputs
from cocoa_embed.model.host_tensor import places
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.joint.settings import JointSettings
from cocoa_embed.train.stages.losses import accuracy, mae_loss, masked_token_loss
from cocoa_embed.train.stages.reconstruction import (
    bidirectional_model_mask,
    full_model_mask,
    last_hidden_states,
    masked_places,
    masked_token_logits,
)


class PixelDecoder(nn.Module):
    """One decoder layer of the language model, then a projection from each visual token to its raw patches.

    The layer starts as a copy of the language model's middle layer and attends bidirectionally.

    :param model: The backbone whose middle layer is copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        decoder: Any = model.get_decoder()
        self.geometry = geometry = family_of(model.config).geometry
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
        :param visual: The indices of the visual tokens in ``[B * L]``, int64 ``[visual tokens]``.
        :param attention_mask: The mask in the form of the model's attention implementation, ``[B, 1, L, L]``.
        :param position_ids: ``[3, B, L]``.
        :returns: ``[visual tokens * patches_per_token, patch_width]``, in the order of ``pixel_values``.
        """
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        decoded = self.layer(hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings)
        patches = self.projection(self.norm(decoded.flatten(0, 1).index_select(0, visual)))
        return torch.reshape(patches, (-1, self.geometry.patch_width))


class JointModel(nn.Module, ABC):
    """The backbone with a pixel decoder: the loss of masked tokens and, by its weight, that of masked patches."""

    text_loss: ClassVar[str]
    """The name of the loss of the masked tokens in the log."""

    def __init__(self, model: PreTrainedModel, settings: JointSettings) -> None:
        super().__init__()
        self.backbone = model
        self.pixel_decoder = PixelDecoder(model)
        self.settings = settings

    @staticmethod
    @abstractmethod
    def states_of(hidden_states: Tensor, masked: Tensor) -> Tensor:
        """Return the states that predict the masked tokens, as ``predicting_states`` does."""

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predict what is masked in a batch of ``JointCollator``.

        :returns: Logits ``[masked tokens, V]`` and patches ``[masked patches, patch_width]``.
        """
        batch = with_host_inputs(self.backbone, batch)
        mask = bidirectional_model_mask(self.backbone, batch["attention_mask"])  # the pixel decoder is never causal
        own_mask = full_model_mask(self.backbone, batch["attention_mask"])
        hidden_states = last_hidden_states(self.backbone, batch, own_mask)
        logits = masked_token_logits(self.backbone, hidden_states, batch, self.states_of)
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
        of_tokens = masked_token_loss(logits, targets, total=tokens)
        mae = mae_loss(
            patches,
            batch["target_patches"],
            normalise_targets=self.settings.normalise_targets,
            total=totals.get("target_patches"),
        )
        return {
            "loss": of_tokens + self.settings.mae_weight * mae,
            self.text_loss: of_tokens,
            "mae_loss": mae,
            "masked_token_accuracy": accuracy(logits, targets, total=tokens),
        }
