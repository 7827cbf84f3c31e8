"""The model of MoCa's pre-training."""

from torch import nn
from transformers import PreTrainedModel

from cocoa_embed.model.families.family import PatchGeometry
from cocoa_embed.train.stages.joint.model import JointModel
from cocoa_embed.train.stages.losses import own_states
from cocoa_embed.train.stages.moca.settings import DEFAULTS, MocaSettings


class MocaModel(JointModel):
    """A masked token is predicted at its own position: ``loss = mlm + mae_weight * mae``.

    The projection to patches follows the decoder's layer directly.
    """

    text_loss = "mlm_loss"
    states_of = staticmethod(own_states)

    def __init__(self, model: PreTrainedModel, geometry: PatchGeometry, settings: MocaSettings = DEFAULTS) -> None:
        super().__init__(model, geometry, settings)
        self.pixel_decoder.norm = nn.Identity()
