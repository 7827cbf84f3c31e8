"""DoRA that computes base outputs once and weight norms once per optimizer step, as a variant of PEFT's layers."""

import weakref
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook

ADAPTER = "default"
"""PEFT's default name for an adapter."""


class Factors(NamedTuple):
    """What the forward passes of an optimizer step have in common, without gradients.

    The first three are float32, the others have the dtype of the base weight.

    :param norm: The row norms of ``W + scaling * B A``, ``[out]``.
    :param scale: ``magnitude / norm``, ``[out]``.
    :param up: ``scaling * B``, ``[out, r]``.
    :param change: ``scale - 1``, ``[out]``, which keeps in bfloat16 what a scale near 1 would lose.
    :param shift: ``-change * bias``, ``[out]``; None without a bias.
    :param scaled_up: ``scale * scaling * B``, ``[out, r]``.
    :param down: A, ``[r, in]``.
    """

    norm: Tensor
    scale: Tensor
    up: Tensor
    change: Tensor
    shift: Tensor | None
    scaled_up: Tensor
    down: Tensor


class CachedDora(DoraLinearVariant):
    """PEFT's DoRA of a linear layer, by the ``Factors`` that ``WeightNorms`` keeps.

    It differs from PEFT's only under dropout, which reaches the low-rank path alone, not the base layer's product.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return ``magnitude / norm * (W x + scaling * B A dropout(x)) + bias`` in the dtype of ``result``.

        :param module: PEFT's ``Linear``.
        :param x: Inputs, ``[..., in]``.
        :param result: The output of the base layer, ``[..., out]``.
        """
        layer, bias = module.lora_magnitude_vector[active_adapter], module.get_base_layer().bias
        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        dropped = module.lora_dropout[active_adapter](x.to(result.dtype))
        scaling = module.scaling[active_adapter]
        output: Tensor = _Adapted.apply(dropped, result, down, up, layer.weight, bias, layer.factors, scaling)
        return output


class _Adapted(torch.autograd.Function):
    """The output of ``CachedDora`` in four kernels, and the gradients of the trained parameters in a few more.

    Autograd alone would compute the factors again in each forward pass, and launch twice as many kernels.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        result: Tensor,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        factors: Factors,
        scaling: float,
    ) -> Tensor:
        dtype, shift = result.dtype, factors.shift
        low_rank = linear(x, factors.down.to(dtype))
        delta = linear(low_rank, factors.scaled_up.to(dtype), None if shift is None else shift.to(dtype))
        ctx.save_for_backward(x, result, low_rank)
        ctx.bias, ctx.factors, ctx.scaling = bias, factors, scaling
        return delta.add_(result).addcmul_(result, factors.change.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (grad,) = grad_outputs
        x, result, low_rank = ctx.saved_tensors
        factors, dtype, needs = ctx.factors, grad.dtype, ctx.needs_input_grad
        grad_low = grad @ factors.scaled_up.to(dtype)
        grad_x = grad_low @ factors.down.to(dtype) if needs[0] else None
        grad_result = torch.addcmul(grad, grad, factors.change.to(dtype)) if needs[1] else None
        grad_down = grad_low.flatten(0, -2).T @ x.flatten(0, -2)
        rows = grad.flatten(0, -2)
        grad_scaled_up = (rows.T @ low_rank.flatten(0, -2)).float()
        grad_scale = (rows * result.flatten(0, -2)).sum(0, dtype=torch.float32) + (grad_scaled_up * factors.up).sum(1)
        if ctx.bias is not None:
            grad_scale -= ctx.bias * rows.sum(0, dtype=torch.float32)
        grad_up = (ctx.scaling * factors.scale).unsqueeze(1) * grad_scaled_up
        return grad_x, grad_result, grad_down.float(), grad_up, grad_scale / factors.norm, None, None, None


class WeightNorms:
    """Keeps the row norms of ``W + scaling * B A`` in all DoRA layers of ``part``, and has ``CachedDora`` use them.

    DoRA treats them as constants (section 4.3 of arXiv 2402.09353), so they change with the weights alone: at an
    optimizer step, or when weights are loaded. The next forward pass of ``part`` computes them without adding up the
    matrices: ``||W||^2 + 2 scaling <W, B A> + scaling^2 ||B A||^2`` by rows. Recomputed activations see the same norms.

    :param part: The module that calls the layers in its forward pass. B must still be zero in all of them.
    """

    def __init__(self, part: nn.Module) -> None:
        self.layers = [module for module in part.modules() if isinstance(module, Linear)]
        for module in self.layers:
            module.lora_variant[ADAPTER] = CachedDora()
            layer: Any = module.lora_magnitude_vector[ADAPTER]  # its weight starts as the norm of W
            layer.register_buffer("base_square", layer.weight.detach().float().square(), persistent=False)
        self._seen: list[Any] | None = None
        self._hook = part.register_forward_pre_hook(lambda *_: self.refresh())
        # A fused optimizer's step does not change the version of a tensor.
        itself = weakref.ref(self)
        weakref.finalize(self, register_optimizer_step_post_hook(lambda *_: _outdate(itself())).remove)

    def remove(self) -> None:
        """Stop following the weights."""
        self._hook.remove()

    def refresh(self) -> None:
        """Compute the norms, if weights have changed since they were computed."""
        seen = [
            (base.weight.dtype, base.weight.device, *(tensor._version for tensor in (base.weight, *trained)))
            for base, *trained in map(_weights, self.layers)
        ]
        if seen == self._seen:
            return
        with torch.inference_mode(False), torch.no_grad():  # a probe may be the first to see new weights
            for module in self.layers:
                layer: Any = module.lora_magnitude_vector[ADAPTER]
                layer.factors = _factors(module)
        self._seen = seen


def _weights(module: Linear) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """Return the base layer, and the adapter's A ``[r, in]``, B ``[out, r]`` and magnitude ``[out]``."""
    parts: tuple[Any, ...] = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
    down, up, magnitude = (part[ADAPTER].weight for part in parts)
    return cast(nn.Linear, module.get_base_layer()), down, up, magnitude


def _factors(module: Linear) -> Factors:
    base, down, up, magnitude = _weights(module)
    dtype, scaled = base.weight.dtype, module.scaling[ADAPTER] * up
    with torch.autocast(down.device.type, enabled=False):
        inner = 2 * (base.weight @ down.to(dtype).T) + scaled @ (down @ down.T)
    base_square = cast(Tensor, module.lora_magnitude_vector[ADAPTER].base_square)
    norm = (base_square + (scaled * inner).sum(dim=1)).sqrt()
    scale = magnitude / norm
    shift = None if base.bias is None else ((1 - scale) * base.bias).to(dtype)
    return Factors(
        norm, scale, scaled, (scale - 1).to(dtype), shift, (scale.unsqueeze(1) * scaled).to(dtype), down.to(dtype)
    )


def _outdate(norms: WeightNorms | None) -> None:
    """Have the norms computed again."""
    if norms is not None:
        norms._seen = None
