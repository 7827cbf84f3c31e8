"""MoCa's pre-training: its collator and its model."""

from typing import Any

from cocoa_embed.train.stages.joint.stage import Joint
from cocoa_embed.train.stages.moca.collator import MocaCollator
from cocoa_embed.train.stages.moca.model import MocaModel
from cocoa_embed.train.stages.moca.settings import MocaSettings


class Moca(Joint[MocaSettings]):
    """Text tokens and visual tokens of ``[images][texts]<EOS>`` are masked and reconstructed at their positions."""

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
