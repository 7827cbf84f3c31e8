"""A loss that is not finite ends a stage at its step: what came after would be a broken model."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from cocoa_embed.errors import CocoaError


class FiniteLossTrainer(Trainer):
    """A :class:`~transformers.Trainer` that checks the loss of every step before the weights change."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a step.

        :raises CocoaError: If its loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise CocoaError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}; lower learning_rate "
                f"({self.args.learning_rate:g}) or raise warmup_steps. This stage has written no checkpoint."
            )
        return loss
