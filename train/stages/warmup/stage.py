"""Stage 1: its collator and its model."""

from cocoa_embed.train.stages.joint.stage import Joint
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel
from cocoa_embed.train.stages.warmup.settings import WarmupSettings


class Warmup(Joint[WarmupSettings]):
    """Some text tokens and some visual tokens of ``[image][text]<EOS>`` are masked and reconstructed."""

    collator_class = WarmupCollator
    model_class = WarmupModel
