"""MoCa's pre-training: what it masks, what replaces masked patches, and where a masked token is predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.data.rows import Row
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.joint.collator import JointCollator
from cocoa_embed.train.stages.joint.model import JointModel
from cocoa_embed.train.stages.joint.stage import Joint
from cocoa_embed.train.stages.losses import own_states
from cocoa_embed.train.stages.masking import draw_uniform, share_noise
from cocoa_embed.train.stages.moca.settings import MocaSettings
from cocoa_embed.train.stages.rendering import ordinary_tokens


@dataclass(frozen=True)
class MocaCollator(JointCollator):
    """Mask each text token and each visual token independently, so that a row may have none masked, or all."""

    settings: MocaSettings

    def mask_tokens(self, batch: Batch, rows: Sequence[Row], generators: Sequence[Generator]) -> Tensor:
        """Mask tokens of instructions and content alike."""
        return draw_uniform(ordinary_tokens(batch, self.processor), generators) < self.settings.text_mask_ratio

    def mask_images(self, exists: Tensor, generators: Sequence[Generator]) -> Tensor:
        """Mask visual tokens one by one."""
        return draw_uniform(exists, generators) < self.settings.image_mask_ratio

    def fill(
        self, pixel_values: Tensor, masked: Tensor, patches_per_image: Sequence[int], generators: Sequence[Generator]
    ) -> Tensor:
        """Fill all masked patches of a row with one patch of noise."""
        return share_noise(pixel_values, masked, patches_per_image, generators)


class MocaModel(JointModel):
    """A masked token is predicted at its own position: ``loss = mlm + mae_weight * mae``.

    The projection to patches follows the decoder's layer directly.
    """

    text_loss = "mlm_loss"
    states_of = staticmethod(own_states)

    def __init__(self, model: PreTrainedModel, settings: MocaSettings) -> None:
        super().__init__(model, settings)
        self.pixel_decoder.norm = nn.Identity()


class Moca(Joint[MocaSettings]):
    """Text tokens and visual tokens of ``[images][texts]<EOS>`` are masked and reconstructed at their own positions."""

    collator_class = MocaCollator
    model_class = MocaModel
    predicts_next = False

    def facts(self) -> dict[str, Any]:
        """Return what the stage reconstructs."""
        return {
            "description": (
                "Stage moca is the pre-training of [MoCa](https://arxiv.org/abs/2506.23115): masked tokens "
                f"({self.settings.text_mask_ratio:.0%}) are predicted at their own positions, and masked patches "
                f"({self.settings.image_mask_ratio:.0%}) by a decoder that is not part of the model."
            )
        }
