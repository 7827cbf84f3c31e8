"""Estimate what a stage's steps cost on a card: its trainer, model and batches run on fake tensors, without weights."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.compiling import layers_to_compile
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.vision_attention import pack_vision_attention
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.batch_facts import FACTS
from cocoa_embed.train.loop.memory_trial import recompute_activations
from cocoa_embed.train.loop.trainer import CocoaTrainer, StageContext
from cocoa_embed.train.plan.cards import Card
from cocoa_embed.train.plan.roofline import Cost, Roofline, Tally, as_on_cuda
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.stage import Stage

FEW_LAYERS = 8
"""A model with at most this many layers is measured whole; a larger one at a few depths (``depths``)."""

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

FULL = 4
"""Bytes of float32."""

ADDED = ("flops", "moved_bytes", "kernels", "host_reads", "seconds")
"""The fields of a ``Cost`` that add up over passes; the others are memory, which each pass frees again."""

ADAM_MOMENTS = 2

OPTIMIZER_PASSES = 11
"""Float32 values that a step moves for each trained weight: Adam reads four and writes three, clipping moves four."""


class Parameters(NamedTuple):
    """The parameters of a model, tied ones counted once.

    :param total: How many there are.
    :param trainable: How many are trained.
    :param bytes: The bytes of all.
    :param trainable_bytes: The bytes of those that are trained, and so of their gradients.
    """

    total: int
    trainable: int
    bytes: int
    trainable_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> "Parameters":
        """Count a model's parameters."""
        every = list(model.parameters())
        groups = every, [each for each in every if each.requires_grad]
        counts = [sum(each.numel() for each in group) for group in groups]
        return cls(*counts, *(sum(each.nbytes for each in group) for group in groups))


class StageMeter:
    """A stage on fake tensors. Every measurement is of one forward and backward pass, as on one device of one process.

    :param config: The config of the backbone.
    :param processor: The processor of the backbone.
    :param rows: The rows to measure; methods refer to them by index (``place``). The sequences of a row are all alike
        (``Stage.alike``).
    """

    def __init__(
        self,
        stage: Stage[StageSettings],
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        rows: Sequence[Row],
        card: Card,
    ) -> None:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._roofline = Roofline(card, fake)
        self._batches: dict[tuple[int, int], dict[str, Any]] = {}
        self._tallies: dict[tuple[int, bool], dict[int, list[Tally]]] = {}
        table = RowTable.of(row for row in rows for _ in range(2))  # a batch needs something to contrast
        self._sequences = [len(stage.alike(row)) for row in rows]
        self._stage = stage = _short(stage)
        self._recomputes = stage.run.gradient_checkpointing is True
        # The cost of the whole model is the weighted sum of the costs of these.
        shallow, self._weights = zip(*depths(config), strict=True)
        with _alone(), self._measuring():
            self._trainers = [_trainer(stage, each, processor, table, fake) for each in shallow]
            for trainer in self._trainers:
                for norms in trainer.adapter.norms if trainer.adapter else ():
                    norms.refresh()  # once per optimizer step
        models = [cast(nn.Module, trainer.model) for trainer in self._trainers]
        for layer in (layer for model in models for layer in layers_to_compile(model) if stage.run.compile):
            self._roofline.compile(layer)
        self.parameters = Parameters(*np.dot(self._weights, list(map(Parameters.of, models))).tolist())

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        swapping = patch.object(torch.utils, "swap_tensors", _set_data)
        with warnings.catch_warnings(), swapping, self._roofline, as_on_cuda(self._roofline):
            warnings.simplefilter("ignore")  # torch warns that fake tensors have no data to point to
            yield

    def mini_batch(self, place: int, sequences: int) -> Cost:
        """Return the cost of a mini-batch of ``sequences`` sequences of the row at ``place``.

        It covers all that a step does with them: in the contrastive stage, two forward passes and a backward pass.
        """
        cost, parts = self.cost(place, sequences), self._sequences[place]
        return cost._replace(**{name: getattr(cost, name) / parts for name in ADDED})

    def recompute_activations(self, *, on: bool) -> None:
        """Turn gradient checkpointing on or off."""
        self._recomputes = on
        for trainer in self._trainers:
            recompute_activations(trainer.model, on=on)

    def state_bytes(self, shards: int = 1) -> dict[str, int]:
        """Return the bytes that a device holds between two passes, by use."""
        counts = self.parameters
        return {
            "weights": counts.bytes // shards,
            "gradients": counts.trainable_bytes // shards,
            "optimizer": ADAM_MOMENTS * FULL * counts.trainable // shards,
        }

    def cost(self, place: int, copies: int) -> Cost:
        """Return the cost of a pass over ``copies`` of the row at ``place``, whose backward pass adds to gradients.

        Two numbers of copies are measured; the costs of all others are computed from these two.
        """
        known = self._tallies.setdefault((place, self._recomputes), {})
        (less, few), (more, many) = [*known.items(), (0, []), (0, [])][:2]
        if copies not in known and (
            not many or any(len(a.work) != len(b.work) for a, b in zip(few, many, strict=True))
        ):
            known[copies] = self._run(place, copies)
        if copies in known:
            costs = [tally.cost() for tally in known[copies]]
        else:
            times = (copies - less) / (more - less)
            costs = [each.cost(other, times) for each, other in zip(few, many, strict=True)]
        whole = Cost(*np.dot(self._weights, costs).tolist())
        # A backward pass frees memory as it goes, so at any depth it needs additional memory for one layer only.
        return whole._replace(backward_bytes=max(cost.backward_bytes for cost in costs))

    def _run(self, place: int, copies: int) -> list[Tally]:
        key, first = (place, copies), self._trainers[0]
        if key not in self._batches:
            self._batches[key] = first.data_collator([first.train_dataset[2 * place]] * copies)  # type: ignore[index]
        return [self._pass(trainer, self._batches[key]) for trainer in self._trainers]

    def _pass(self, trainer: CocoaTrainer, batch: dict[str, Any]) -> Tally:
        tensors = {name: self._faked(value) for name, value in batch.items() if name != FACTS}
        self._stage.run_whole(trainer, max(v.numel() for n, v in tensors.items() if n.endswith("attention_mask")))
        self._roofline.tally = tally = Tally()
        with self._measuring():
            cast(Tensor, trainer.compute_loss(cast(nn.Module, trainer.model), tensors)).backward()
        return tally

    def _faked(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.uint8):
            return self._roofline.fake.from_tensor(value)
        return value

    @property
    def optimizer_seconds(self) -> float:
        """The time of an optimiser step in seconds."""
        return OPTIMIZER_PASSES * FULL * self.parameters.trainable / self._roofline.card.bandwidth


def _short(stage: Stage[StageSettings]) -> Stage[StageSettings]:
    """Return the stage with the settings that a meter needs: one step, no probe, no workers, no sharding."""
    changes = {"steps": 1, "epochs": None, "min_steps": None}
    changes |= {name: 0 for name in ("probe_rows", "warmup_steps") if name in type(stage.settings).model_fields}
    run = {"sharding": "none", "attn_implementation": "sdpa", "report_to": (), "workers": 0, "vision_cache": None}
    return type(stage)(stage.name, stage.settings.model_copy(update=changes), stage.run.model_copy(update=run))


def _trainer(
    stage: Stage[StageSettings],
    config: PreTrainedConfig,
    processor: ProcessorMixin,
    rows: RowTable,
    fake: FakeTensorMode,
) -> CocoaTrainer:
    """Return the trainer of a stage, on fake tensors, whose gradients exist already, as after an earlier pass."""
    backbone = Backbone(_fake_model(config, stage, fake), processor)
    with TemporaryDirectory() as folder:
        arguments = stage.arguments(steps=1, folder=Path(folder)) | {"use_cpu": True}
        trainer = stage.trainer(backbone, rows, StageContext(arguments=arguments))
    model: Any = trainer.model
    if stage.run.mixed_precision == "bf16":
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # as accelerate does
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    model.train()
    return trainer


def _fake_model(config: PreTrainedConfig, stage: Stage[StageSettings], fake: FakeTensorMode) -> PreTrainedModel:
    """Return the stock model of a config, as ``load_backbone`` would load it."""
    with torch.device("meta"):
        model = family_of(config).model_class(config)
    with fake:
        for module in model.modules():
            owned: Any = (module._parameters, module._buffers)
            for tensors in owned:
                for name, each in tensors.items():
                    if each is not None:
                        empty = torch.empty_like(each, device="cpu")
                        tensors[name] = (
                            nn.Parameter(empty, each.requires_grad) if isinstance(each, nn.Parameter) else empty
                        )
    model.tie_weights()
    model.config.get_text_config().is_causal = not stage.run.bidirectional
    pack_vision_attention(model)
    if stage.run.gradient_checkpointing is True:
        recompute_activations(model, on=True)
    return model


def _set_data(parameter: Tensor, other: Tensor) -> None:
    """Replace ``swap_tensors``, which refuses fake tensors."""
    parameter.data = other


@contextmanager
def _alone() -> Iterator[None]:
    """Measure in one process on the CPU, even in a run of several processes or on a GPU."""
    with ExitStack() as changes:
        changes.enter_context(patch.dict(os.environ))
        for name in RANKS:
            os.environ.pop(name, None)
        states: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)
        for state in states:
            changes.enter_context(patch.dict(state._shared_state, clear=True))
        PartialState(cpu=True)
        yield


def depths(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, int]]:
    """Return configs of shallow models with weights: the cost of the whole model is the weighted sum of their costs.

    The first model has each kind of layer once. Each of the others has one more layer of one kind; its weight is the
    number of layers of this kind that the whole model has beyond those of the first.
    """
    family = family_of(config)
    layers = family.layers()
    if sum(layers.values()) <= FEW_LAYERS:
        return [(config, 1)]
    base = {**dict.fromkeys(layers, 1), **dict.fromkeys(("text", "vision"), family.fewest_layers())}
    more = [({**base, kind: base[kind] + 1}, count - base[kind]) for kind, count in layers.items()]
    variants = [(base, 1 - sum(weight for _, weight in more)), *more]
    return [(family.with_layers(each), weight) for each, weight in variants if weight]
