"""DoRA that computes base outputs once and weight norms once per optimizer step, as a variant of PEFT's layers."""

import weakref
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook

ADAPTER = "default"
"""PEFT's name of an only adapter."""


class CachedDora(DoraLinearVariant):
    """PEFT's DoRA of a linear layer with ``WeightNorms``, which have to be up to date.

    It differs from PEFT's only under dropout, which reaches the low-rank path alone, not the base layer's product.
    """

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Return ``magnitude / norm * (W + scaling * B A) x + bias`` in the dtype of the base layer's output.

        :param x: Inputs, ``[..., in_features]``.
        :param result: The output of the base layer, ``[..., out_features]``.
        """
        layer, dtype, bias = module.lora_magnitude_vector[active_adapter], result.dtype, module.get_base_layer().bias
        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scale = layer.weight / layer.norm
        change = scale - 1  # keeps in bfloat16 what a scale near 1 would lose
        low_rank = linear(module.lora_dropout[active_adapter](x.to(dtype)), down.to(dtype))
        scaled_up = (module.scaling[active_adapter] * scale).unsqueeze(1) * up
        shift = None if bias is None else (-change * bias).to(dtype)
        delta = linear(low_rank, scaled_up.to(dtype), shift)
        return torch.addcmul(result + delta, result, change.to(dtype))


class WeightNorms:
    """Keeps the row norms of ``W + scaling * B A`` in all DoRA layers of ``part``, and has ``CachedDora`` use them.

    DoRA takes them as constants (section 4.3 of arXiv 2402.09353), so they change with the weights alone: at an
    optimizer step, or when weights are loaded. The next forward pass of ``part`` computes them, without the sum of the
    matrices: ``||W||^2 + 2 scaling <W, B A> + scaling^2 ||B A||^2`` by rows. Recomputed activations see the same norms.

    :param part: Calls the layers in its forward pass. B is still zero in all of them.
    """

    def __init__(self, part: nn.Module) -> None:
        self.layers = [module for module in part.modules() if isinstance(module, Linear)]
        for module in self.layers:
            module.lora_variant[ADAPTER] = CachedDora()
            layer = module.lora_magnitude_vector[ADAPTER]  # its weight starts as the norm of W
            layer.register_buffer("norm", layer.weight.detach().float(), persistent=False)
            layer.register_buffer("base_square", layer.norm.square(), persistent=False)
        self._seen: list[Any] | None = None
        self._hook = part.register_forward_pre_hook(lambda *_: self.refresh())
        # A fused optimizer's step does not change the version of a tensor.
        itself = weakref.ref(self)
        weakref.finalize(self, register_optimizer_step_post_hook(lambda *_: _outdate(itself())).remove)

    def remove(self) -> None:
        """Stop following the weights."""
        self._hook.remove()

    def outdate(self) -> None:
        """Have the norms computed again."""
        self._seen = None

    def refresh(self) -> None:
        """Compute the norms, if weights have changed since they were computed."""
        weights = [_weights(module) for module in self.layers]
        seen = [(base.dtype, base.device, base._version, down._version, up._version) for base, down, up in weights]
        if seen == self._seen:
            return
        with torch.inference_mode(False), torch.no_grad():  # a probe may be the first to see new weights
            for module, (base, down, up) in zip(self.layers, weights, strict=True):
                layer, scaling = module.lora_magnitude_vector[ADAPTER], module.scaling[ADAPTER]
                with torch.autocast(base.device.type, enabled=False):
                    products = base @ down.to(base.dtype).T
                    gram = down @ down.T
                    changes = scaling * up * (2 * products + scaling * (up @ gram))
                layer.norm = (layer.base_square + changes.sum(dim=1)).sqrt()
        self._seen = seen


def _weights(module: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Return the base weight ``[out, in]``, and the adapter's A ``[r, in]`` and B ``[out, r]``."""
    return module.get_base_layer().weight, module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight


def _outdate(norms: WeightNorms | None) -> None:
    if norms is not None:
        norms.outdate()
