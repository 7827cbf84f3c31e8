"""A recipe's settings as transformers' training arguments: what one device runs of a global batch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.errors import UsageError
from cocoa_embed.model.flex_attention import FLEX, resolve_attention
from cocoa_embed.train.loop.progress import TENSORBOARD
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import ContrastiveSection, ReconstructionSection, StageSection

DECAY_SHARE = 0.3
"""Part of the steps over which ``warmup_stable_decay`` lets the learning rate fall."""

MOST_WORKERS = 8
"""Beyond this many processes a device, memory is spent and nothing is gained."""


def step_count(section: StageSection, rows: int) -> int:
    """Return a stage's optimisation steps over ``rows`` rows; an epoch is each row once, or once in each direction."""
    if section.steps is not None:
        return section.steps
    assert section.epochs is not None  # the section's own validation
    if isinstance(section, ContrastiveSection) and section.both_directions:
        rows *= 2
    return max(1, math.ceil(section.epochs * rows / section.batch_size))


def training_arguments(
    recipe: Recipe,
    stage: str,
    *,
    steps: int,
    folder: Path,
    layers: Sequence[str] = (),
    finds_unused: bool = True,
) -> dict[str, Any]:
    """Return the arguments of ``TrainingArguments`` for a stage.

    :param folder: Where checkpoints go.
    :param layers: The classes of the layers that sharding keeps whole.
    :param finds_unused: Expect passes that leave parts of the model out, as texts leave out the vision encoder.
    :raises UsageError: If the batch cannot be divided among the devices.
    """
    section = recipe.section(stage)
    devices = PartialState().num_processes
    at_once, accumulated = micro_batches(stage, section, devices)
    on_cpu = not torch.accelerator.is_available()
    workers = worker_count(recipe)
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        **_sharing(section, at_once, devices),
        "gradient_accumulation_steps": accumulated,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.schedule,
        "lr_scheduler_kwargs": _schedule_arguments(section, steps),
        "warmup_steps": section.warmup_steps,
        "weight_decay": section.weight_decay,
        "adam_beta2": section.adam_beta2,
        "logging_steps": section.logging_steps,
        "logging_nan_inf_filter": False,
        "bf16": recipe.mixed_precision == "bf16",
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and devices > 1 else None,
        "ddp_find_unused_parameters": finds_unused,
        "save_strategy": "steps",
        "save_steps": section.save_steps,
        "save_total_limit": 2,  # the one before stays until the newest is whole
        # TensorBoard's writer gets a folder of the run (progress.py): transformers' own is gone with the checkpoints.
        "report_to": [name for name in recipe.report_to if name != TENSORBOARD] or "none",
        "run_name": f"{recipe.name}-{stage}",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        # A contrastive batch is large, and every worker holds so many of them.
        "dataloader_prefetch_factor": (1 if isinstance(section, ContrastiveSection) else 4) if workers else None,
        "seed": recipe.seed,
        **_sharding(recipe, layers),
    }


def micro_batches(stage: str, section: StageSection, devices: int) -> tuple[int, int]:
    """Return how many rows all devices run at once, and how many times that makes a step.

    :raises UsageError: If the batch cannot be divided so.
    """
    if section.batch_size % devices:
        raise UsageError(f"{stage}.batch_size {section.batch_size} is no multiple of the {devices} devices.")
    if not isinstance(section, ReconstructionSection) or section.micro_batch_size is None:
        return section.batch_size, 1
    at_once = min(section.micro_batch_size * devices, section.batch_size)
    if section.batch_size % at_once:
        raise UsageError(
            f"{stage}.batch_size {section.batch_size} is no multiple of {at_once}, the micro_batch_size "
            f"{section.micro_batch_size} on {devices} device{'s' * (devices > 1)}."
        )
    return at_once, section.batch_size // at_once


def worker_count(recipe: Recipe) -> int:
    """Return the processes that read and preprocess rows for each device."""
    if recipe.workers is not None:
        return recipe.workers
    if not torch.accelerator.is_available():
        return 0  # they would take the cores that the model runs on
    return max(1, min(MOST_WORKERS, available_cores() // torch.accelerator.device_count() - 1))


def checking_worker_count(recipe: Recipe) -> int:
    """Return the processes that decode all images before training, when the machine has nothing else to do."""
    return (
        available_cores() - 1 if recipe.workers is None and torch.accelerator.is_available() else worker_count(recipe)
    )


def stage_attention(recipe: Recipe, stage: str) -> str:
    """Return the attention implementation of a stage on this machine.

    :raises UsageError: If the recipe asks for one that cannot be trained here.
    """
    asked = recipe.attn_implementation
    if not recipe.bidirectional:
        if asked == FLEX:
            raise UsageError(f"bidirectional=false goes with attn_implementation sdpa or eager, not with {FLEX}.")
        return "sdpa" if asked == "auto" else asked
    if stage == "contrastive" and asked == FLEX:
        asked = "auto"  # sentence-transformers makes its masks, and has no tiles
    return resolve_attention(asked, stage=stage, device_type=PartialState().device.type)


def _schedule_arguments(section: StageSection, steps: int) -> dict[str, Any]:
    if section.schedule != "warmup_stable_decay":
        return {}
    return {"num_decay_steps": max(1, round(steps * DECAY_SHARE))}


def _sharing(section: StageSection, at_once: int, devices: int) -> dict[str, Any]:
    """Say how devices come by their parts of one global batch."""
    if isinstance(section, ContrastiveSection):
        # Its batch sampler shares batches out itself (shared_batches.py).
        return {"per_device_train_batch_size": at_once // devices}
    return {"per_device_train_batch_size": at_once, "accelerator_config": {"split_batches": True}}


def _sharding(recipe: Recipe, layers: Sequence[str]) -> dict[str, Any]:
    if recipe.sharding == "none":
        return {}
    return {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": True,
            "transformer_layer_cls_to_wrap": list(layers),
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }
