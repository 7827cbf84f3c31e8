"""Estimate what every recipe costs on cards that are not at hand: each kernel's FLOPs and bytes, on fake tensors.

    python benchmarks/roofline.py [RECIPE...] [--json]
    python benchmarks/roofline.py --variants
    python benchmarks/roofline.py --plain

It needs no GPU and no weights: the stages' own trainers, models and batches run on tensors without values
(``train/plan/meter.py``), at the depths that show what a layer costs. A kernel takes as long as the slowest of its
launch, its bytes and its FLOPs. Trust the ratios; waiting for data, the host or other devices is not estimated.

A row has an image of 256 visual tokens with 64 tokens of text, and a text of 40 tokens. ``--variants`` measures one
mini-batch of the contrastive stage of Qwen2-VL-2B with different adapters. ``--plain`` compares warm-up and bridge with
the plain implementation, at the same number of rows and at the most rows that each can hold: the stock class with
logits of all tokens and PEFT's adapter, without packed vision attention.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import load_processor, read_config
from cocoa_embed.model.families.registry import family_of, family_of_images
from cocoa_embed.train import Recipe
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop import stage_trainer
from cocoa_embed.train.loop.memory_trial import RESERVE
from cocoa_embed.train.plan.cards import CARDS
from cocoa_embed.train.plan.cost import StepCost, batch_shape
from cocoa_embed.train.plan.fit import GB, fit_to_card
from cocoa_embed.train.plan.meter import StageMeter
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.stage import Stage
from cocoa_embed.train.stages.warmup.stage import WarmupModel
from shared.models import MODELS, model_config, stand_in_processor
from shared.output import command_line, report
from steps.sides import PlainModel, peft_adapter

GIB = 2**30
WORD = "the "
"""A text of one token."""


@dataclass(frozen=True)
class Setting:
    """Where a recipe runs, and on how much: the card, the number of cards, and the rows of its data."""

    card: str = "h100"
    devices: int = 8
    rows: int = 300_000


SETTINGS = {
    "qwen2-vl-2b": Setting(),
    "qwen2.5-vl-3b": Setting(),
    "qwen2.5-vl-7b": Setting(),
    "qwen3-vl-2b": Setting(),
    "moca-qwen2.5-vl-3b": Setting(),
    "own-folder": Setting("rtx4090", 1, 50_000),
    "smolvlm-256m": Setting("rtx4090", 1, 50_000),
    "internvl3-1b": Setting("rtx4090", 1, 50_000),
    "tiny": Setting("h100", 1, 4_000),
}

VARIANT_ROWS = 8

PLAIN = {
    "full fine-tuning": [f"{stage}.adapter=null" for stage in ("warmup", "bridge")],
    "DoRA, dropout 0": [f"{stage}.adapter.dropout=0" for stage in ("warmup", "bridge")],
}

SIDES = {
    "ours": [],
    "compiled": ["compile=true"],
    "compiled, checkpointing": ["compile=true", "gradient_checkpointing=true"],
    "plain": [],
}

VARIANTS = {
    "the recipe: DoRA, dropout 0.1, checkpointing": ["gradient_checkpointing=true"],
    "DoRA, dropout 0": ["gradient_checkpointing=true", "contrastive.adapter.dropout=0"],
    "LoRA, dropout 0.1": ["gradient_checkpointing=true", "contrastive.adapter.kind=lora"],
    "LoRA, dropout 0": [
        *("gradient_checkpointing=true", "contrastive.adapter.kind=lora", "contrastive.adapter.dropout=0"),
    ],
    "the recipe, no checkpointing": ["gradient_checkpointing=false"],
    "DoRA, dropout 0, no checkpointing": ["contrastive.adapter.dropout=0", "gradient_checkpointing=false"],
    "full fine-tuning, no checkpointing": ["contrastive.adapter=null", "gradient_checkpointing=false"],
}


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("recipes", nargs="*", choices=[[], *SETTINGS], metavar="RECIPE", help="all by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="override of the recipes")
    parser.add_argument("--variants", action="store_true", help="one mini-batch at 2B with different adapters instead")
    parser.add_argument("--plain", action="store_true", help="warm-up and bridge at 2B against the plain way instead")
    return parser.parse_args()


def open_backbone(recipe: Recipe) -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Return the config and the processor of a recipe's backbone, or stand-ins of its size."""
    name = recipe.backbone.rpartition("/")[2].lower().removesuffix("-instruct")
    if name not in MODELS:
        return read_config(name), load_processor(name, max_length=recipe.max_length)
    config = model_config(name)
    processor = stand_in_processor(config, max_length=recipe.max_length)
    family_of_images(processor).limit_pixels(processor, recipe.max_pixels)
    return config, processor


@contextmanager
def opened(name: str, overrides: list[str]) -> Iterator[tuple[Recipe, Row, tuple[PreTrainedConfig, ProcessorMixin]]]:
    """Yield a recipe, a row of its data with the largest square image, and its backbone."""
    recipe = Recipe.load(name, overrides)
    config, processor = open_backbone(recipe)
    side = int(family_of_images(processor).most_pixels(processor) ** 0.5)
    with TemporaryDirectory() as folder:
        image = Path(folder, f"{side}.png")
        Image.new("RGB", (side, side)).save(image)
        yield recipe, Row(Item(WORD * 61, (image,)), Item(WORD * 38), source="drawn"), (config, processor)


def step(
    stage: Stage[StageSettings],
    row: Row,
    backbone: tuple[PreTrainedConfig, ProcessorMixin],
    where: Setting,
    sequences: int | None = None,
) -> dict[str, Any]:
    """Return what a step of a stage costs on one device, by mini-batch.

    :param sequences: The sequences of a mini-batch; by default as many as fit.
    """
    alike, card = stage.alike(row), CARDS[where.card]
    meter = StageMeter(stage, *backbone, alike, card)
    on_device = stage.settings.batch_size // where.devices
    shapes = [batch_shape(each) for each in stage.sequences(numbered([row])[0], backbone[1])]
    chosen = fit_to_card(stage, meter, shapes, where.devices, card.memory * GB)
    at_once = [sequences or chosen.sequences(stage, where.devices, shape) for shape in shapes]
    mini_batches = [meter.mini_batch(place, count) for place, count in enumerate(at_once)]
    passes = [(on_device / count, each) for count, each in zip(at_once, mini_batches, strict=True)]
    seconds = sum(count * each.seconds for count, each in passes) + meter.optimizer_seconds
    eager_seconds = sum(count * each.eager_seconds for count, each in passes) + meter.optimizer_seconds
    flops = sum(count * each.flops for count, each in passes)
    settings = stage.settings
    epochs_steps = -(-where.rows * (settings.epochs or 0) * stage.passes_per_epoch // settings.batch_size)
    steps = settings.steps or max(int(epochs_steps), settings.min_steps or 1)
    return {
        "stage": stage.name,
        "mini_batches": [each._asdict() for each in mini_batches],
        "rows_at_once": at_once,
        "sizes_at_once": chosen.sizes,
        "gradient_checkpointing": chosen.recomputes,
        "seconds_per_step": seconds,
        "eager_seconds_per_step": eager_seconds,
        "flops_per_step": flops,
        "steps": steps,
        "hours": steps * seconds / 3600,
        "parameters": meter.parameters._asdict(),
        "memory_bytes": sum(meter.state_bytes().values()) + max(each.peak_bytes for each in mini_batches),
    }


def measure(names: list[str], overrides: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in names:
        with opened(name, overrides) as (recipe, row, backbone):
            stages = [step(stage, row, backbone, SETTINGS[name]) for stage in recipe.stages.values()]
        results[name] = {**asdict(SETTINGS[name]), "hours": sum(each["hours"] for each in stages), "stages": stages}
        print(f"{name}: {results[name]['hours']:.1f} hours", file=sys.stderr)
    return results


def measure_variants() -> dict[str, Any]:
    results = {}
    for name, changes in VARIANTS.items():
        with opened("qwen2-vl-2b", changes) as (recipe, row, backbone):
            results[name] = step(recipe.stages["contrastive"], row, backbone, Setting(), VARIANT_ROWS)
    return results


class PlainMeter(StageMeter):
    """A stage in the plain implementation, without checkpointing."""

    def __init__(self, *args: Any) -> None:
        with patch.object(stage_trainer, "prepare_trainable", plain_adapter):
            super().__init__(*args)
        for trainer in self._trainers:
            trainer.model = Plain(trainer.model)


class Plain(PlainModel):
    def __init__(self, ours: WarmupModel | BridgeModel) -> None:
        super().__init__(ours)
        family = family_of(ours.backbone.config)
        for layer in family.vision_layers(ours.backbone):
            attention: Any = layer.get_submodule(family.parts.attention)
            attention.config = family.encoder(ours.backbone).config

    def forward(self, totals: object, **batch: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {"loss": super().forward(**batch)["loss"]}


def plain_adapter(model: PreTrainedModel, settings: StageSettings, **_: bool) -> None:
    if settings.adapter is not None:
        peft_adapter(model, settings.adapter)


def measure_plain() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for (name, adapter), (side, changes) in product(PLAIN.items(), SIDES.items()):
        with opened("qwen2-vl-2b", ["gradient_checkpointing=false", *adapter, *changes]) as (recipe, row, backbone):
            for key, stage in list(recipe.stages.items())[:2]:
                batch = stage.sequences(numbered([row])[0], backbone[1])[0]
                useful = StepCost.of(backbone[0], stage.settings).of_shape(batch_shape(batch))
                meter = (PlainMeter if side == "plain" else StageMeter)(stage, *backbone, [row], CARDS["h100"])
                meter.cost(0, VARIANT_ROWS // 2)
                state = sum(meter.state_bytes().values())
                room = CARDS["h100"].memory * GB - RESERVE - state
                largest = next(rows for rows in count(VARIANT_ROWS) if meter.cost(0, rows + 1).peak_bytes > room)
                results[f"{key}, {name}, {side}"] = {
                    f"at_{rows}_rows": {
                        **(cost := meter.cost(0, rows))._asdict(),
                        "eager_seconds": cost.eager_seconds,
                        "rows_per_second": rows / cost.seconds,
                        "mfu": useful * rows / cost.seconds / CARDS["h100"].bf16,
                        "memory_bytes": state + cost.peak_bytes,
                    }
                    for rows in (VARIANT_ROWS, largest)
                }
    return results


def show_plain(results: dict[str, Any]) -> None:
    print("| stage | rows at once | ms | rows/s | MFU | memory GiB | kernels |\n|---|---|---|---|---|---|---|")
    for name, sizes in results.items():
        for size, each in sizes.items():
            speed = f"{each['seconds'] * 1000:,.0f} | {each['rows_per_second']:.1f} | {each['mfu']:.0%}"
            memory = f"{each['memory_bytes'] / GIB:.1f} | {each['kernels']:,.0f}"
            print(f"| {name} | {size.split('_')[1]} | {speed} | {memory} |")


def show(results: dict[str, Any]) -> None:
    print("| recipe | on | stage | ms a mini-batch | s a step | memory GiB | hours |\n|---|---|---|---|---|---|---|")
    for name, result in results.items():
        for stage in result["stages"]:
            cells = [name, f"{result['devices']} {result['card']}", *cells_of(stage)]
            print(f"| {' | '.join(cells)} | {stage['hours']:.1f} |")
        print(f"| **{name}** | | | | | | **{result['hours']:.1f}** |")


def show_variants(results: dict[str, Any]) -> None:
    print("| adapter | stage | ms a mini-batch | s a step | memory GiB | kernels |\n|---|---|---|---|---|---|")
    for name, stage in results.items():
        kernels = ", ".join(f"{each['kernels']:,.0f}" for each in stage["mini_batches"])
        print(f"| {name} | {' | '.join(cells_of(stage))} | {kernels} |")


def cells_of(stage: dict[str, Any]) -> list[str]:
    counted = zip(stage["mini_batches"], stage["rows_at_once"], strict=True)
    times = ", ".join(f"{each['seconds'] * 1000:,.0f} ({rows} rows)" for each, rows in counted)
    how = ", checkpointing" * stage["gradient_checkpointing"]
    memory = f"{stage['memory_bytes'] / GIB:.1f}"
    return [stage["stage"], times + how, f"{stage['seconds_per_step']:.2f}", memory]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.variants:
        results, shown = measure_variants(), show_variants
    elif options.plain:
        results, shown = measure_plain(), show_plain
    else:
        results, shown = measure(options.recipes or list(SETTINGS), options.set), show
    report(results, shown, as_json=options.json)


if __name__ == "__main__":
    main()
