"""Single operators cost what one counts by hand."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx, metrics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.loop.adapters import add_adapter
from cocoa_embed.train.plan.cards import CARDS, LAUNCH_SECONDS
from cocoa_embed.train.plan.roofline import Cost, Roofline, Tally, as_on_cuda
from cocoa_embed.train.settings import AdapterSettings

CARD = CARDS["h100"]


@pytest.fixture
def meter() -> Roofline:
    return Roofline(CARD, FakeTensorMode(allow_non_fake_inputs=True))


def fake(meter: Roofline, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with meter.fake:
        return torch.empty(*shape, dtype=dtype)


def test_a_matrix_product_reads_both_and_writes_one(meter: Roofline) -> None:
    left, right = (fake(meter, *shape, dtype=torch.bfloat16) for shape in ((1000, 2000), (2000, 3000)))
    with meter:
        product = left @ right
    flops, moved = 2 * 1000 * 2000 * 3000, 2 * (1000 * 2000 + 2000 * 3000 + 1000 * 3000)
    kept = 2 * 1000 * 3000
    assert product.shape == (1000, 3000)
    assert meter.tally.cost() == Cost(flops, moved, 1, 0, pytest.approx(flops / CARD.bf16), kept)
    assert flops / CARD.bf16 > moved / CARD.bandwidth > LAUNCH_SECONDS


def test_a_kernel_takes_its_launch_its_bytes_or_its_flops(meter: Roofline) -> None:
    small, large = fake(meter, 8), fake(meter, 10**9)
    with meter:
        small + 1
        assert meter.tally.cost().seconds == LAUNCH_SECONDS
        large + 1
        assert meter.tally.cost().seconds == pytest.approx(LAUNCH_SECONDS + 8e9 / CARD.bandwidth)


def test_views_cost_nothing_and_repeated_values_are_read_once(meter: Roofline) -> None:
    row = fake(meter, 1, 1000)
    with meter:
        wide = row.expand(500, 1000)
        wide.reshape(500, 10, 100).transpose(0, 1)[2:4]
        assert meter.tally.cost().kernels <= 1, "reshape may copy, views may not"
        before = meter.tally.cost().moved_bytes
        wide + 1
    assert meter.tally.cost().moved_bytes - before == 4 * (1000 + 500 * 1000)


def test_a_lookup_reads_what_it_returns(meter: Roofline) -> None:
    table, numbers = fake(meter, 100_000, 64), torch.zeros(10, dtype=torch.long)
    with meter:
        functional.embedding(numbers, table)
    assert meter.tally.cost().moved_bytes == 2 * 4 * 10 * 64 + 8 * 10


def test_memory_is_counted_while_it_is_held(meter: Roofline) -> None:
    start = fake(meter, 1000)
    with meter:
        first = start + 1
        second = first * 2
        del first
        third = second - 1
        assert (meter.tally.live_bytes, meter.tally.peak_bytes) == (8000, 8000)
        first = third + second
        first.add_(1)
        assert (meter.tally.live_bytes, meter.tally.peak_bytes) == (12000, 12000)
        del first, second, third
    assert (meter.tally.live_bytes, meter.tally.peak_bytes) == (0, 12000)


def test_attention_is_one_kernel_each_way_and_casts_as_autocast_does(meter: Roofline) -> None:
    query, key, value = (fake(meter, 2, 4, 10, 16, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    with meter, as_on_cuda(meter):
        functional.scaled_dot_product_attention(query, key, value).sum().backward()
    forward = 4 * 2 * 4 * 10 * 10 * 16
    assert meter.tally.cost().flops == forward + 2.5 * forward
    assert next(moved for moved, flops, *_ in meter.tally.work if flops == forward) == 4 * 2 * query.numel()
    full = fake(meter, 2, 4, 10, 16)
    with meter, as_on_cuda(meter), torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.scaled_dot_product_attention(full, full, full).dtype == torch.bfloat16


def test_what_the_host_reads_is_counted(meter: Roofline) -> None:
    grid, values = torch.tensor([[1, 4, 4]]), fake(meter, 3, 5)
    with meter, as_on_cuda(meter):
        assert grid.prod(dim=1).tolist() == [16], "real integers keep their values"
        assert meter.tally.host_reads == 1
        assert values.isfinite().all()
        assert meter.tally.host_reads == 2
        assert values[grid[0] > 2].shape == (2, 5)
        assert meter.tally.host_reads == 3


def test_patched_functions_are_restored(meter: Roofline) -> None:
    before = functional.scaled_dot_product_attention, nn.functional.dropout, Tensor.backward, Tensor.item
    with as_on_cuda(meter):
        assert functional.scaled_dot_product_attention is not before[0]
    assert before == (functional.scaled_dot_product_attention, nn.functional.dropout, Tensor.backward, Tensor.item)


class Layer(nn.Module):
    """Two pointwise operators, a product, a reduction, and another pointwise operator."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        product = (x.sigmoid() * 2) @ self.weight
        return product / product.sum(-1, keepdim=True)


def test_a_compiled_layer_has_one_kernel_for_what_a_product_or_its_end_reads(meter: Roofline) -> None:
    layer = Layer(fake(meter, 64, 64))
    meter.compile(layer)
    with meter:
        out = layer(fake(meter, 1000, 64))
    rows, weight, sums = 4 * 1000 * 64, 4 * 64 * 64, 4 * 1000
    read_by_the_end = rows + sums + rows
    assert meter.tally.cost().moved_bytes == (rows + rows) + (rows + weight + rows) + (rows + sums) + read_by_the_end
    assert meter.tally.cost().kernels == 4
    meter.tally = Tally()
    with meter:
        out.exp()
    assert meter.tally.cost().moved_bytes == 2 * rows, "the end of the layer has written it"


def test_a_compiled_layer_keeps_what_its_fused_kernels_read(meter: Roofline) -> None:
    def kept(*, compiled: bool) -> int:
        meter.tally = Tally()
        layer, x = nn.Sequential(nn.Sigmoid(), nn.SiLU(), nn.GELU()), fake(meter, 1000, 64).requires_grad_()
        if compiled:
            meter.compile(layer)
        with meter, as_on_cuda(meter):
            layer(x).sum().backward()
        return meter.tally.kept_bytes

    scalars = 8
    assert kept(compiled=False) == pytest.approx(2 * 4 * 1000 * 64, abs=scalars), "x itself is not the layer's"
    assert kept(compiled=True) == pytest.approx(0, abs=scalars), "all is computed again from x"


@pytest.mark.slow
def test_inductor_moves_no_more_than_the_meter_counts(
    meter: Roofline, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Backbone
) -> None:
    """A decoder layer with DoRA, forward and backward, by Inductor's own count of its kernels."""
    model: Any = tiny_backbone.model.train()
    add_adapter(model, AdapterSettings(kind="dora", r=4, dropout=0), vision=False)
    layer, width = model.get_decoder().layers[0], model.config.get_text_config().hidden_size
    caught: list[dict[str, Any]] = []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: caught.append(kwargs), with_kwargs=True)
    positions = torch.arange(64).expand(3, 16, 64)
    model.get_decoder()(inputs_embeds=torch.randn(16, 64, width), position_ids=positions, use_cache=False)
    hook.remove()
    monkeypatch.setattr(metrics, "num_bytes_accessed", 0)
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "level", logging.INFO)
    torch._dynamo.reset()
    layer.compile()
    layer(torch.randn(16, 64, width, requires_grad=True), **caught[0]).sum().backward()
    by_inductor, layer._compiled_call_impl = metrics.num_bytes_accessed, None
    assert by_inductor > 0

    def counted() -> float:
        meter.tally = Tally()
        with meter, as_on_cuda(meter):
            layer(torch.randn(16, 64, width, requires_grad=True), **caught[0]).sum().backward()
        return meter.tally.cost().moved_bytes

    eager = counted()
    meter.compile(layer)
    assert by_inductor < counted() < 0.75 * eager
