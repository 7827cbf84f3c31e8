"""Count what a device would do: FLOPs, bytes, kernels, seconds and memory of whatever runs on fake tensors."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cocoa_embed.model import vision_attention
from cocoa_embed.train.plan.cards import HOST_SECONDS, LAUNCH_SECONDS, Card

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")
"""Operators that launch no kernel, in addition to views."""

GATHERS = ("embedding", "index", "index_select", "gather")
"""Operators that read of their first argument only the values that they return."""

FUSED = ("_to_copy", "cat", "clone", "copy_", "gelu_backward", "silu_backward", "slice_backward", "zeros", "zeros_like")
"""Operators that a compiler fuses, in addition to pointwise ones."""

REDUCTIONS = ("amax", "mean", "native_layer_norm", "native_layer_norm_backward", "sum")
"""Operators that a compiler fuses with what they read; a norm is a reduction with a pointwise operator after it."""

MOST_SOURCES = 4
"""A fused kernel reads at most this many tensors (Inductor's ``realize_reads_threshold``)."""

ATTENTION_SPEED = 0.75
"""The speed of a fused attention kernel, relative to a matrix product."""

Sources: TypeAlias = dict[int, tuple[Any, int]]
"""What a fused kernel reads: storages, kept while it may still run, with their bytes."""


class Cost(NamedTuple):
    """What some work costs on one device.

    :param flops: FLOPs of matrix products and attention, recomputed ones included.
    :param moved_bytes: Bytes that kernels read and write.
    :param kernels: The number of kernels launched.
    :param host_reads: How often the host waits for a value from the device.
    :param seconds: The time of all kernels; each takes as long as the slowest of its launch, its bytes and its FLOPs.
    :param forward_bytes: The peak memory outside of backward passes, above what was allocated before.
    :param kept_bytes: The memory at the start of a backward pass, above what was allocated before.
    :param backward_bytes: The peak memory in a backward pass, above ``kept_bytes``.
    """

    flops: float = 0.0
    moved_bytes: float = 0.0
    kernels: float = 0.0
    host_reads: float = 0.0
    seconds: float = 0.0
    forward_bytes: float = 0.0
    kept_bytes: float = 0.0
    backward_bytes: float = 0.0

    @property
    def eager_seconds(self) -> float:
        """The seconds of card or host, whichever takes longer: the host launches kernels while the card runs others."""
        return max(self.seconds, self.kernels * HOST_SECONDS)

    @property
    def peak_bytes(self) -> float:
        """The peak memory, above what was allocated before."""
        return max(self.forward_bytes, self.kept_bytes + self.backward_bytes)


@dataclass
class Tally:
    """A running ``Cost``.

    :param work: For each kernel: bytes, FLOPs, and the seconds that each of the two takes.
    :param born: Storages made since the tally began.
    """

    host_reads: int = 0
    forward_bytes: int = 0
    kept_bytes: int = 0
    backward_bytes: int = 0
    live_bytes: int = 0
    peak_bytes: int = 0
    work: list[tuple[float, float, float, float]] = field(default_factory=list)
    born: set[int] = field(default_factory=set)

    def begin_backward(self) -> None:
        """Note the memory of the forward pass that ends."""
        self.forward_bytes = max(self.forward_bytes, self.peak_bytes)
        self.peak_bytes = self.live_bytes

    def end_backward(self, kept: int) -> None:
        """Note the memory of the backward pass that ends; it began with ``kept`` bytes."""
        self.kept_bytes = max(self.kept_bytes, kept)
        self.backward_bytes = max(self.backward_bytes, self.peak_bytes - kept)
        self.peak_bytes = self.live_bytes

    def cost(self, other: "Tally | None" = None, times: float = 0.0) -> Cost:
        """Return the cost so far.

        :param other: The same kernels on another number of rows. ``times`` the difference is added, as bytes, FLOPs
            and memory grow with the rows.
        """
        (work, rest), (other_work, other_rest) = (each._values() for each in (self, other or self))
        work, rest = work + times * (other_work - work), rest + times * (other_rest - rest)
        moved, flops, *seconds = work.T
        busy = np.maximum(LAUNCH_SECONDS, np.maximum(*seconds)).sum()
        reads, *memory = rest.tolist()
        return Cost(float(flops.sum()), float(moved.sum()), len(work), reads, float(busy), *memory)

    def _values(self) -> tuple[np.ndarray, np.ndarray]:
        self.begin_backward()
        rest = self.host_reads, self.forward_bytes, self.kept_bytes, self.backward_bytes
        return np.array(self.work, dtype=float).reshape(-1, 4), np.array(rest)


class Roofline(TorchDispatchMode):
    """Counts what operators would cost on a card, whether tensors are fake or real.

    Tensors that decide on shapes are real: token ids, masks, image grids. If the host reads a value of a fake tensor,
    it gets 1; if it compares two tensors, they differ.

    :param card: The card that runs it.
    :param fake: The mode of the fake tensors; new floating-point tensors are fake, too.
    """

    def __init__(self, card: Card, fake: FakeTensorMode) -> None:
        super().__init__()
        self.card = card
        self.fake = fake
        self.tally = Tally()
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._sources: dict[int | None, Sources] = {}  # of tensors that no kernel has written yet
        self._held: set[int] = set()
        self._compiled: set[str] = set()  # which passes of a compiled layer run

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping would wrap each call

    def compile(self, layer: nn.Module) -> None:
        """Count a layer as Inductor would compile it, forward and backward.

        A pointwise operator costs nothing itself. When a matrix product, attention or the end of the layer takes its
        result, one kernel writes it from the tensors that are in memory; the backward pass keeps those tensors, not
        the result. Inductor moves fewer bytes: it also writes several results in one kernel.
        """

        def run(part: str, *_: object) -> None:
            self._compiled.add(part)

        def end(part: str, _: nn.Module, ins: object, outs: object) -> None:
            self.write(tree_leaves(outs if part == "forward" else ins))
            self._compiled -= {"forward", part}

        layer.register_forward_pre_hook(partial(run, "forward"))
        layer.register_forward_hook(partial(end, "forward"))
        layer.register_full_backward_pre_hook(partial(run, "backward"))
        layer.register_full_backward_hook(partial(end, "backward"))

    def write(self, tensors: Iterable[Any]) -> None:
        """Count a kernel for each of the tensors that no kernel has written yet."""
        for each in tensors:
            key = id(each.untyped_storage()) if isinstance(each, Tensor) else None
            if (sources := self._sources.pop(key, None)) is not None:
                self._hold(each)
                self.count(0, _sum(sources) + _bytes(each), each.dtype)

    def _read(self, tensors: Iterable[Tensor]) -> Sources:
        """Return what a fused kernel reads to use tensors: themselves, or the sources of those not written yet."""
        found: Sources = {}
        for each in tensors:
            storage = each.untyped_storage()
            found |= self._sources.get(id(storage), {id(storage): (storage, _bytes(each))})
        return found

    def _defer(self, tensor: Tensor, sources: Sources) -> None:
        """Leave a tensor to be written by a later kernel; until then its sources are kept instead of its own memory."""
        key = id(tensor.untyped_storage())
        self._sources[key] = {each: (None if each == key else kept, size) for each, (kept, size) in sources.items()}

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operator and count it."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].device
        if func.namespace == "prim":  # another query, not an operator
            return func(*args, **kwargs)
        kind = _kind(func)
        if kind.name in ("_local_scalar_dense", "equal") and any(isinstance(each, FakeTensor) for each in args):
            self.tally.host_reads += kind.name == "equal"  # the others are counted by name in ``as_on_cuda``
            return kind.name != "equal" and torch.ones((), dtype=args[0].dtype).item()
        if kind.name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            self.tally.host_reads += any(each is not None and each.dtype == torch.bool for each in args[1])
            args = (args[0], [*_as_positions(args[1])], *args[2:])
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        with self.fake if not given and _makes_floats(kind.name, kwargs.get("dtype")) else nullcontext():
            out = func(*args, **kwargs)
        if kind.is_view:
            return out
        results = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if not kind.is_in_place:
            for result in results:
                self._track(result)
        flops = kind.flops(*args, **kwargs, out_val=out) if kind.flops else 0
        self._count_operator(kind, given, results, flops)
        return out

    def _count_operator(self, kind: "_Kind", given: list[Tensor], results: list[Tensor], flops: int) -> None:
        compiled = bool(self._compiled) and not kind.is_free and bool(results)
        # In place on a tensor from before the tally: it adds to a gradient.
        adds_up = kind.is_in_place and id(given[0].untyped_storage()) not in self.tally.born
        if compiled and kind.is_pointwise and not adds_up:
            sources = self._read(given)
            for each in results:
                self._defer(each, sources)
            if len(sources) > MOST_SOURCES:
                self.write(results)
            return
        moved, written = 0, results
        if compiled and kind.name in REDUCTIONS:
            moved = _sum(sources := self._read(given))
            if "norm" in kind.name:
                self._defer(results[0], sources)
                written = results[1:]
        elif not kind.is_free:
            self.write(given)
            moved = sum(map(_bytes, results + given[1:] if kind.name in GATHERS else given))
        for each in written:
            self._hold(each)
        if results and not kind.is_free:
            self.count(flops, moved + sum(map(_bytes, written)), results[0].dtype)

    def count(self, flops: float, moved: float, dtype: torch.dtype, speed: float = 1.0) -> None:
        """Count a kernel."""
        peak = speed * (self.card.bf16 if dtype == torch.bfloat16 else self.card.full)
        self.tally.work.append((moved, flops, moved / self.card.bandwidth, flops / peak))

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages and self._storages[key]() is storage:
            return

        tally = self.tally

        def freed(_: object) -> None:
            if key in self._held:
                self._held.remove(key)
                tally.live_bytes -= size
            tally.born.discard(key)
            self._sources.pop(key, None)
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        tally.born.add(key)

    def _hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor that an operator has made."""
        storage, tally = tensor.untyped_storage(), self.tally
        if id(storage) in self._storages and id(storage) not in self._held:
            self._held.add(id(storage))
            tally.live_bytes += storage.nbytes()
            tally.peak_bytes = max(tally.peak_bytes, tally.live_bytes)


class _Kind(NamedTuple):
    name: str
    is_view: bool
    is_in_place: bool
    is_free: bool
    is_pointwise: bool
    flops: Callable[..., int] | None


@cache
def _kind(func: Any) -> _Kind:  # noqa: ANN401
    """Return what kind of operator ``func`` is."""
    name = func._schema.name.split("::")[1]
    aliases = [each.alias_info for each in func._schema.returns if each.alias_info is not None]
    is_view = any(not alias.is_write for alias in aliases)
    is_free = name.startswith("sym_") or name in ALLOCATIONS
    is_pointwise = name in FUSED or torch.Tag.pointwise in func.tags
    return _Kind(name, is_view, bool(aliases), is_free, is_pointwise, flop_registry.get(func.overloadpacket))


def _sum(sources: Sources) -> int:
    """Return the bytes of all sources."""
    return sum(size for _, size in sources.values())


def _makes_floats(name: str, dtype: torch.dtype | None) -> bool:
    """Return whether an operator that takes no tensor makes one of floats."""
    if dtype is None:
        return name in ("empty", "empty_strided", "zeros", "ones", "eye", "rand", "randn", "linspace")
    return dtype.is_floating_point


def _as_positions(indices: Any) -> Iterator[Tensor | None]:  # noqa: ANN401
    """Yield indices with real bool ones as positions: a fake tensor cannot tell how many there are."""
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8) and not isinstance(index, FakeTensor):
            yield from index.nonzero().unbind(1)
        else:
            yield index


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values; those that it repeats by a stride of 0 count once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _all_bytes(*tensors: Tensor | None) -> int:
    return sum(_bytes(each) for each in tensors if each is not None)


class _Attention(torch.autograd.Function):
    """Attention as one kernel forward and one backward, which keep queries, keys, values, output and mask."""

    @staticmethod
    def forward(ctx: Any, meter: Roofline, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pairs: int) -> Tensor:  # noqa: ANN401
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, mask)
        meter.write((q, k, v, mask))
        ctx.meter, ctx.flops = meter, 2 * pairs * (q.shape[-1] + v.shape[-1])
        moved = _all_bytes(q, k, v, out, mask)
        meter.count(ctx.flops, moved, q.dtype, ATTENTION_SPEED)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        q, k, v, out, mask = ctx.saved_tensors
        ctx.meter.write(grads)
        moved = _all_bytes(q, k, v, q, k, v, out, *grads, mask)
        ctx.meter.count(2.5 * ctx.flops, moved, q.dtype, ATTENTION_SPEED)
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


HOST_READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor that wait for its value."""


@contextmanager
def as_on_cuda(meter: Roofline) -> Iterator[None]:
    """Run functions as one kernel, in the dtype that they have on CUDA; record host reads and backward passes."""
    packed = partial(_packed_attention, meter)
    functions: dict[str, Any] = {
        "scaled_dot_product_attention": partial(_attention, meter),
        "dropout": _dropout,
        "layer_norm": partial(_layer_norm, functional.layer_norm),
    }
    methods: dict[str, Any] = {name: _counted(meter, getattr(Tensor, name)) for name in HOST_READS}
    methods["backward"] = _watched(meter, Tensor.backward)
    with (
        patch.multiple(functional, **functions),
        patch.multiple(Tensor, **methods),
        patch.object(vision_attention, "_kernel", lambda _: packed),
    ):
        yield


def _counted(meter: Roofline, read: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of tensors that waits for a value, wrapped so that the wait is counted."""

    def counted(tensor: Tensor, *args: Any) -> Any:  # noqa: ANN401
        before = meter.tally.host_reads
        value = read(tensor, *args)
        meter.tally.host_reads = before + 1  # one method may call another
        return value

    return counted


def _watched(meter: Roofline, backward: Callable[..., None]) -> Callable[..., None]:
    """Return ``Tensor.backward``, wrapped to record its memory; a nested one (gradient cache) counts by itself."""

    def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        meter.tally.begin_backward()
        kept = meter.tally.live_bytes
        backward(tensor, *args, **kwargs)
        meter.tally.end_backward(kept)

    return watched


def _attention(
    meter: Roofline,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: object,
    **kwargs: object,
) -> Tensor:
    """Replace ``scaled_dot_product_attention``, as one kernel."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None:
        attn_mask = attn_mask if isinstance(attn_mask, FakeTensor) else meter.fake.from_tensor(attn_mask)
        if attn_mask.dtype == torch.bool:  # the kernels take an additive mask
            attn_mask = torch.where(attn_mask, query.new_empty(()), query.new_empty(()))
    pairs = query.shape[:-1].numel() * key.shape[-2]
    out: Tensor = _Attention.apply(meter, query, key, value, attn_mask, pairs)
    return out


def _packed_attention(
    meter: Roofline, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *_: Any
) -> Tensor:
    """Replace ``varlen_attn``, as one kernel."""
    pairs = query.shape[1] * int((np.diff(boundaries.numpy()).astype(np.int64) ** 2).sum())
    out: Tensor = _Attention.apply(meter, query, key, value, None, pairs)
    return out


def _dropout(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Replace ``dropout``, as one kernel."""
    return torch.native_dropout(values, p, True)[0] if training and p else values


def _layer_norm(function: Callable[..., Tensor], values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replace ``layer_norm``, which CUDA's autocast runs in float32."""
    return function(values.float() if torch.is_autocast_enabled("cpu") else values, *args, **kwargs)
