"""The model of stage 1."""

from transformers import PreTrainedModel

from cocoa_embed.model.families.family import PatchGeometry
from cocoa_embed.train.stages.joint.model import JointModel
from cocoa_embed.train.stages.losses import predicting_states
from cocoa_embed.train.stages.warmup.settings import DEFAULTS, WarmupSettings


class WarmupModel(JointModel):
    """A masked token is predicted from the state before it: ``loss = mntp + mae_weight * mae``."""

    text_loss = "mntp_loss"
    states_of = staticmethod(predicting_states)

    def __init__(self, model: PreTrainedModel, geometry: PatchGeometry, settings: WarmupSettings = DEFAULTS) -> None:
        super().__init__(model, geometry, settings)
