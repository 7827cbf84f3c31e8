"""Tensors that stay in the CPU's memory, and indices that are found without waiting for a device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class HostTensor(Tensor):
    """A tensor that stays in the CPU's memory when its batch goes to a device, so that reading it does not wait."""

    def to(self, *args: Any, **kwargs: Any) -> "HostTensor":  # type: ignore[override]
        """Return the tensor itself; ``on`` copies it."""
        return self

    def on(self, device: torch.device) -> Tensor:
        """Return an ordinary copy on a device, without waiting for it; the same one each time."""
        copies: dict[torch.device, Tensor] = vars(self).setdefault("copies", {})
        if device not in copies:
            with torch._C.DisableTorchFunctionSubclass():
                copies[device] = self.as_subclass(Tensor).to(device, non_blocking=True)
        return copies[device]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Let slices stay on the CPU, too; all other results are ordinary tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func in _STAYING:
                return result.as_subclass(cls)
            return result.as_subclass(Tensor) if isinstance(result, cls) else result


_STAYING = {Tensor.__getitem__, Tensor.index_select, Tensor.pin_memory}


def on_host(tensor: Tensor) -> HostTensor:
    """Return a CPU tensor as one that stays there."""
    return tensor.as_subclass(HostTensor)


def places(mask: Tensor, count: int) -> Tensor:
    """Return the indices of a mask's ``count`` true values in the flattened mask: int64 ``[count]``.

    Unlike ``nonzero``, it does not wait for the device to count them.
    """
    return mask.flatten().int().argsort(descending=True, stable=True)[:count]
