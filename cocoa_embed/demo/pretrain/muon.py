"""Muon for the weight matrices of a model's layers, AdamW for everything else, as one optimizer."""

from typing import Any

import torch
from torch import Tensor, nn

from cocoa_embed.errors import UsageError

LAYERS = ("visual.", "language_model.layers.")
"""Names of the modules whose matrices Muon updates; AdamW updates embeddings and the heads of a stage."""


def require_muon() -> None:
    """Check that torch has Muon.

    :raises UsageError: If it does not.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(f"muon_learning_rate needs torch 2.9, but this is {torch.__version__}; set it to null.")


class MuonAndAdamW(torch.optim.Optimizer):
    """AdamW, and Muon (Jordan et al. 2024) with updates as large as AdamW's at the same learning rate.

    :param model: Its parameters that require gradients are optimised.
    :param decayed: Names of the parameters with weight decay.
    :param rates: The learning rates of AdamW and of Muon.
    """

    def __init__(
        self, model: nn.Module, decayed: list[str], rates: tuple[float, float], weight_decay: float, adam_beta2: float
    ) -> None:
        matrices, rest, undecayed = list[Tensor](), list[Tensor](), list[Tensor]()
        for name, each in model.named_parameters():
            if not each.requires_grad:
                continue
            is_matrix = each.ndim == 2 and any(part in name for part in LAYERS)
            (matrices if is_matrix else rest if name in decayed else undecayed).append(each)
        others: list[dict[str, Any]] = [{"params": rest}, {"params": undecayed, "weight_decay": 0.0}]
        self.parts = (
            torch.optim.AdamW(others, lr=rates[0], weight_decay=weight_decay, betas=(0.9, adam_beta2)),
            torch.optim.Muon(matrices, lr=rates[1], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give both parts this optimizer's state and groups."""
        for part, groups in zip(self.parts, (self.param_groups[:2], self.param_groups[2:]), strict=True):
            part.state, part.param_groups = self.state, groups

    def step(self, closure: Any = None) -> Any:  # noqa: ANN401
        """Update all parameters; a closure, which transformers does not use, is called once."""
        loss = closure and closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of both optimizers."""
        super().load_state_dict(state_dict)
        self._share()
