"""A stage on fake tensors costs what the same stage costs with real ones."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from stages import alone, trainer_arguments
from tiny_backbones import LoadTiny, every_family_slowly
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.batch_facts import FACTS
from cocoa_embed.train.loop.trainer import CocoaTrainer, StageContext
from cocoa_embed.train.plan import meter as meter_module
from cocoa_embed.train.plan.cards import CARDS
from cocoa_embed.train.plan.cost import BatchShape, batch_shape, forward_flops, model_size
from cocoa_embed.train.plan.meter import Parameters, StageMeter, depths
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.moca.settings import MocaSettings
from cocoa_embed.train.stages.moca.stage import Moca
from cocoa_embed.train.stages.stage import Stage
from cocoa_embed.train.stages.warmup.settings import WarmupSettings
from cocoa_embed.train.stages.warmup.stage import Warmup

COPIES = 2
ADAPTERS = [None, {"kind": "lora", "r": 4}, {"kind": "dora", "r": 4}]
KINDS: dict[str, Any] = {
    "warmup": (Warmup, WarmupSettings),
    "moca": (Moca, MocaSettings),
    "bridge": (Bridge, BridgeSettings),
    "contrastive": (Contrastive, ContrastiveSettings),
}


def a_stage(kind: str, run: dict[str, Any] | None = None, **settings: Any) -> Stage[Any]:
    made, its_settings = KINDS[kind]
    return alone(made, its_settings(steps=1, batch_size=2 * COPIES, **settings), **(run or {}))


def measured(stage: Stage[Any], backbone: Backbone, row: Row) -> StageMeter:
    return StageMeter(stage, backbone.model.config, backbone.processor, [row], CARDS["h100"])


def real(stage: Stage[Any], backbone: Backbone, row: Row, folder: Path) -> tuple[CocoaTrainer, dict[str, Any]]:
    """Return the stage's own trainer with real weights, and the batch that the meter measures."""
    probe = {"probe_rows": 0} if "probe_rows" in type(stage.settings).model_fields else {}
    quiet = type(stage)(stage.name, stage.settings.model_copy(update=probe), stage.run)
    trainer = quiet.trainer(backbone, RowTable.of([row] * 2), StageContext(arguments=trainer_arguments(folder)))
    batch = trainer.data_collator([trainer.train_dataset[0]] * COPIES)  # type: ignore[index]
    return trainer, {name: value for name, value in batch.items() if name != FACTS}


@pytest.fixture
def row(scene_rows: list[Row]) -> Row:
    return scene_rows[0]


@pytest.mark.parametrize(("kind", "adapter"), [("warmup", None), ("bridge", ADAPTERS[1]), ("warmup", ADAPTERS[2])])
@every_family_slowly
def test_flops_agree_with_torchs_counter(
    load_tiny: LoadTiny, row: Row, tmp_path: Path, kind: str, adapter: dict[str, Any] | None
) -> None:
    stage, backbone = a_stage(kind, adapter=adapter), load_tiny("eager")
    config = copy.deepcopy(backbone.model.config)
    config._attn_implementation = "sdpa"
    estimate = StageMeter(stage, config, backbone.processor, [row], CARDS["h100"]).cost(0, COPIES)
    trainer, batch = real(stage, backbone, row, tmp_path)
    for norms in trainer.adapter.norms if trainer.adapter else ():
        norms.refresh()  # once per optimizer step, so not in the estimate
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    # A fused backward pass computes the scores again: one product more than eager attention.
    forward = forward_flops(model_size(config), batch_shape(batch))
    scores = (forward.text_attention + forward.vision_attention) / 2
    assert 0 < scores < 0.2 * estimate.flops
    assert estimate.flops == pytest.approx(counter.get_total_flops() + scores, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "freeze_vision", "adapter"),
    [
        ("warmup", False, None),
        ("moca", False, ADAPTERS[1]),
        ("bridge", True, ADAPTERS[1]),
        ("contrastive", False, ADAPTERS[2]),
    ],
)
def test_parameters_are_those_of_the_real_module_tree(
    tiny_backbone: Backbone, row: Row, tmp_path: Path, kind: str, freeze_vision: bool, adapter: dict[str, Any] | None
) -> None:
    stage = a_stage(kind, adapter=adapter, freeze_vision=freeze_vision)
    counted = measured(stage, tiny_backbone, row).parameters
    trainer, _ = real(stage, tiny_backbone, row, tmp_path)
    assert counted == Parameters.of(trainer.model)
    assert (counted.trainable < counted.total) == (freeze_vision or adapter is not None)


def deep_config(backbone: Backbone) -> PreTrainedConfig:
    """Return a config whose weights of layers are more than 1."""
    config: Any = copy.deepcopy(backbone.model.config)
    config.get_text_config().num_hidden_layers = 4
    setattr(config.vision_config, family_of(config).parts.depth, 4)
    if getattr(config.get_text_config(), "layer_types", None):
        config.get_text_config().layer_types = config.get_text_config().layer_types[:1] * 4
    changed: PreTrainedConfig = AutoConfig.for_model(**config.to_dict())
    return changed


@pytest.mark.parametrize(
    ("kind", "checkpointing", "adapter"),
    [
        ("warmup", False, {"kind": "dora"}),
        ("bridge", True, None),
        pytest.param("contrastive", True, {"kind": "lora"}, marks=pytest.mark.slow),
    ],
)
@every_family_slowly
def test_the_cost_of_all_layers_follows_from_few(
    tiny_backbone: Backbone,
    row: Row,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    checkpointing: bool,
    adapter: dict[str, Any] | None,
) -> None:
    run = {"mixed_precision": "bf16", "gradient_checkpointing": checkpointing}
    stage, config = a_stage(kind, run, adapter=adapter), deep_config(tiny_backbone)
    monkeypatch.setattr(meter_module, "FEW_LAYERS", 4)
    assert len(depths(config)) > 1
    few = StageMeter(stage, config, tiny_backbone.processor, [row], CARDS["h100"])
    monkeypatch.setattr(meter_module, "FEW_LAYERS", 100)
    assert len(depths(config)) == 1
    whole = StageMeter(stage, config, tiny_backbone.processor, [row], CARDS["h100"])
    assert few.parameters == whole.parameters
    whole.cost(0, COPIES)  # the first pass of all has a few kernels more
    cost, expected = few.cost(0, COPIES), whole.cost(0, COPIES)
    assert cost[:5] == pytest.approx(expected[:5], rel=1e-3)
    assert cost.kept_bytes == pytest.approx(expected.kept_bytes, rel=1e-3)
    assert cost.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.15), "gradients on the way are estimated"


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("bridge", {"compile": True}),
        pytest.param("warmup", {}, marks=pytest.mark.slow),
        pytest.param("contrastive", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_the_cost_of_any_number_of_rows_follows_from_two(
    tiny_backbone: Backbone, row: Row, kind: str, run: dict[str, Any]
) -> None:
    stage = a_stage(kind, {"mixed_precision": "bf16", **run}, adapter={"kind": "dora", "r": 4})
    meter, another = (measured(stage, tiny_backbone, row) for _ in range(2))
    two, nine = meter.cost(0, 2), meter.cost(0, 9)
    computed, run_itself = meter.cost(0, 5), another.cost(0, 5)
    assert two.moved_bytes < computed.moved_bytes < nine.moved_bytes
    assert computed[:-1] == pytest.approx(run_itself[:-1], rel=1e-3)
    # The layer with the peak is another one with more rows: between two numbers, a line is above the peak or on it.
    assert 0.999 <= computed.peak_bytes / run_itself.peak_bytes < 1.05


def kept_bytes(trainer: CocoaTrainer, batch: dict[str, Any]) -> int:
    """Return the bytes that the backward pass keeps, each storage once, without weights and inputs."""
    there = [*trainer.model.parameters(), *(value for value in batch.values() if isinstance(value, Tensor))]
    weights = {each.untyped_storage().data_ptr() for each in there}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.compute_loss(trainer.model.train(), batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("kind", "adapter"), [("warmup", None), ("bridge", ADAPTERS[1]), ("warmup", ADAPTERS[2])])
def test_activations_are_those_that_the_backward_pass_keeps(
    tiny_backbone: Backbone, row: Row, tmp_path: Path, kind: str, adapter: dict[str, Any] | None
) -> None:
    # On a CPU, dropout keeps a mask of floats where CUDA keeps booleans.
    stage = a_stage(kind, adapter=adapter and {**adapter, "dropout": 0})
    estimate = measured(stage, tiny_backbone, row).cost(0, COPIES)
    assert estimate.kept_bytes == pytest.approx(kept_bytes(*real(stage, tiny_backbone, row, tmp_path)), rel=0.2)
    assert estimate.peak_bytes > estimate.kept_bytes


def test_a_mini_batch_of_pairs_is_one_of_its_columns(tiny_backbone: Backbone, row: Row) -> None:
    """A step of so many texts and as many images costs the sum of a mini-batch of each."""
    stage = a_stage("contrastive")
    alike = stage.alike(row)
    assert [len(each.query.images) for each in alike] == [1, 0]
    args = (tiny_backbone.model.config, tiny_backbone.processor)
    apart, together = (StageMeter(stage, *args, rows, CARDS["h100"]) for rows in (alike, [row]))
    images, texts = (apart.mini_batch(place, COPIES) for place in range(2))
    assert images.flops > texts.flops
    assert images.seconds + texts.seconds == pytest.approx(together.cost(0, COPIES).seconds, rel=0.02)


def test_a_measurement_is_one_process_and_leaves_no_trace(tiny_backbone: Backbone, row: Row) -> None:
    before = dict(PartialState()._shared_state), nn.Linear(2, 2).weight.dtype
    PartialState._shared_state["num_processes"] = 8
    try:
        alone_of_eight = measured(a_stage("contrastive"), tiny_backbone, row).cost(0, COPIES)
        assert PartialState().num_processes == 8
    finally:
        PartialState._shared_state["num_processes"] = before[0]["num_processes"]
    of_one = measured(a_stage("contrastive"), tiny_backbone, row).cost(0, COPIES)
    assert alone_of_eight == pytest.approx(of_one, rel=1e-2)
    assert (dict(PartialState()._shared_state), nn.Linear(2, 2).weight.dtype) == before


def test_shapes_are_of_the_batch_that_is_measured(tiny_backbone: Backbone, row: Row, tmp_path: Path) -> None:
    """The premise of the comparison with torch's counter."""
    _, batch = real(a_stage("bridge"), tiny_backbone, row, tmp_path)
    shape = batch_shape(batch)
    assert shape == BatchShape(shape.lengths[:1] * COPIES, shape.image_grids[:1] * COPIES, shape.masked_tokens)
