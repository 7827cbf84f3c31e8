"""A recipe's settings as transformers' training arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.train.loop.callbacks import TENSORBOARD
from cocoa_embed.train.settings import RunSettings, StageSettings

DECAY_RATIO = 0.3
"""The ratio of steps in which the learning rate of ``warmup_stable_decay`` falls."""

MOST_WORKERS = 8
"""More processes per device take memory and gain nothing."""

BATCHES_PER_WORKER = 4
"""Batches that a worker prepares ahead."""


def training_arguments(
    run: RunSettings,
    settings: StageSettings,
    *,
    name: str,
    steps: int,
    folder: Path,
    at_once: int,
    accumulated: int,
    layers: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the arguments of ``TrainingArguments`` for a stage.

    :param name: The name of the stage's run in logging services.
    :param folder: The folder of the checkpoints.
    :param at_once: Rows of a micro-batch, over all devices.
    :param accumulated: Micro-batches of a step.
    :param layers: The class names of the layers that sharding does not split.
    """
    on_cpu, workers = not torch.accelerator.is_available(), worker_count(run)
    decay = {"num_decay_steps": max(1, round(steps * DECAY_RATIO))}
    sharding = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": True,
            "transformer_layer_cls_to_wrap": list(layers),
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": at_once,
        # A batch of the data loader is for all devices together.
        "accelerator_config": {"split_batches": True, "non_blocking": torch.cuda.is_available()},
        "gradient_accumulation_steps": accumulated,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "lr_scheduler_kwargs": decay if settings.schedule == "warmup_stable_decay" else {},
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        **({"optim": "adamw_torch_fused"} if torch.cuda.is_available() else {}),  # its steps can be skipped
        "adam_beta2": settings.adam_beta2,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "bf16": run.mixed_precision == "bf16",
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and PartialState().num_processes > 1 else None,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # they are constants
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 2,  # the previous checkpoint stays until the newest is complete
        # TensorBoard logs go to the run's folder (callbacks.py); transformers would put them into the checkpoints'.
        "report_to": [service for service in run.report_to if service != TENSORBOARD] or "none",
        "run_name": name,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "dataloader_prefetch_factor": BATCHES_PER_WORKER if workers else None,
        "seed": run.seed,
        **(sharding if run.sharding == "fsdp2" else {}),
    }


def worker_count(run: RunSettings) -> int:
    """Return the number of processes per device that read and preprocess rows."""
    if run.workers is not None:
        return run.workers
    if not torch.accelerator.is_available():
        return 0  # the model runs on the same cores
    return max(1, min(MOST_WORKERS, available_cores() // torch.accelerator.device_count() - 1))


def checking_worker_count(run: RunSettings) -> int:
    """Return the number of threads that check images before training, when all cores are free."""
    return available_cores() - 1 if run.workers is None and torch.accelerator.is_available() else worker_count(run)
