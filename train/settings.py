"""The settings that all stages share. Validating them imports no torch and reads no file."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from cocoa_embed.data.image_folder import RowChoice

Ratio = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]

Auto: TypeAlias = Literal["auto"]
"""Chosen when a stage begins, to fit into the memory of the device."""

Pooling: TypeAlias = Literal["eos", "mean"]
OnBadRow: TypeAlias = Literal["stop", "skip"]

APath = TypeVar("APath", Path, str, None)

MOST_AUTO_ROWS = 16
"""The most rows of a mini-batch where ``auto`` tries nothing: on a CPU, with sharded weights, and in plans."""

SOURCE_KINDS = ("folder", "file", "webdataset", "mmeb", "hub")
"""The keys of ``SourceSettings`` of which a source gives exactly one."""


def expand_home(path: APath) -> APath:
    """Replace ``~`` at the start of a path with the user's home folder, as a shell does; other names do not change."""
    return path if path is None else type(path)(os.path.expanduser(path))


class Settings(BaseModel):
    """A section of a recipe. Unknown keys are refused, and values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ColumnsSettings(Settings):
    """The table column of each part of a row; a part without a column is absent.

    A column of negatives holds one value or a list of values, as JSON in a CSV file. An image is a path, or the bytes
    of a file inside the table. An instruction precedes its text; a row whose instruction is empty has none.
    """

    query_instruction: str | None = None
    query_text: str | None = None
    query_image: str | None = None
    positive_instruction: str | None = None
    positive_text: str | None = None
    positive_image: str | None = None
    negative_text: str | None = None
    negative_image: str | None = None


class SourceSettings(Settings):
    """Where rows come from: one of ``folder``, ``file``, ``webdataset``, ``mmeb`` and ``hub``.

    :param folder: An image folder with ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``.
    :param file: A ``.jsonl``, ``.csv`` or ``.parquet`` file, or a glob of such files, with ``columns``.
        A file may be remote, as in ``s3://bucket/rows.csv``.
    :param webdataset: A ``.tar`` file with an image and a text of the same name for each row, or a glob of such files.
    :param mmeb: The MMEB-train layout: a folder, or a name on the hub. Without ``subsets``, its 20 in-domain subsets.
    :param hub: A data set on the hub, or a folder in the format of ``datasets``, with ``columns``.
    :param columns: By default, columns named as the keys of ``ColumnsSettings``, or those of a common layout
        (``KNOWN_LAYOUTS`` in ``data/columns.py``).
    :param config: The configuration of a ``hub`` or ``mmeb`` data set; by default the name of an ``mmeb`` subset.
    :param split: The split of a ``hub`` or ``mmeb`` data set; ``train`` also means MMEB-train's ``original``.
    :param images: The folder that relative image paths start from; by default the folder of the file or data set.
        ``mmeb`` from the hub needs it, since the images are not part of the data set.
    :param query_instruction: The instruction of every query (of images, in an image folder), if no column has it.
    :param positive_instruction: The instruction of every positive and negative, if no column has it.
    :param captions: For image folders: one row per image (its ``text``), or one per entry of its ``captions`` or of its
        ``questions``.
    :param paraphrases: For image folders: this many text-only rows per image, from one caption to another.
    :param limit: Use only this many entries (images of a folder, otherwise rows), drawn by the recipe's seed; by
        default all.
    :param limit_order: ``first`` takes the first entries instead.
    :param weight: How often each row is drawn. The recipe's seed draws the rows that a fraction adds.
    """

    folder: Path | None = None
    file: str | None = None
    webdataset: str | None = None
    mmeb: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    images: Path | None = None
    columns: ColumnsSettings | None = None
    query_instruction: str | None = None
    positive_instruction: str | None = None
    captions: RowChoice = "text"
    paraphrases: Count = 0
    limit: Positive | None = None
    limit_order: Literal["random", "first"] = "random"
    weight: Rate = 1.0

    @property
    def instructions(self) -> dict[Literal["query", "positive"], str]:
        """The constant instructions by side."""
        return {side: given for side in ("query", "positive") if (given := getattr(self, f"{side}_instruction"))}

    _expand_home = field_validator("images", *SOURCE_KINDS)(expand_home)

    @model_serializer(mode="wrap")
    def _as_given(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not given: a default would override the value of the enclosing settings."""
        return {key: value for key, value in serialise(self).items() if key in self.model_fields_set}


class DataSettings(SourceSettings):
    """The rows of a stage: from one source, or from several named ``subsets``.

    A stage inherits the keys that it leaves out from the recipe's ``data``, and a subset from the settings that
    contain it. The innermost settings that name a source decide on the source.

    :param on_bad_row: ``stop`` ends the run at an unusable row; ``skip`` leaves out up to 1 % of a stage's rows and
        lists them in ``bad_rows.jsonl``.
    :param max_rows: The most rows of all subsets together. The recipe's seed draws them from the rows that the stage
        can use, so that subsets keep their proportions.
    """

    subsets: dict[str, SourceSettings] | None = Field(None, min_length=1)
    max_rows: Positive | None = None
    on_bad_row: OnBadRow = "stop"


class AdapterSettings(Settings):
    """Low-rank matrices that are trained while the weights are frozen, and merged into them at the end of the stage.

    The vision encoder is adapted too, unless ``freeze_vision`` is set.

    :param dropout: The dropout of the low-rank matrices' inputs; the frozen weights get theirs without dropout.
    """

    kind: Literal["lora", "dora"] = "dora"
    r: Positive = 8
    alpha: Positive = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class StageSettings(Settings):
    """The data and the optimisation of a stage.

    :param steps: Optimisation steps; or give ``epochs``.
    :param min_steps: With ``epochs``, the fewest steps: a small set is drawn more often.
    :param batch_size: Rows per step, over all devices.
    :param adapter: Train an adapter instead of the weights.
    :param freeze_vision: Do not train the vision encoder.
    :param freeze_layers: Do not train this many of the language model's first layers. Not with an adapter.
    :param max_pixels: Larger images are scaled down to this; by default the recipe's ``max_pixels``.
    :param warmup_steps: Steps in which the learning rate rises.
    :param schedule: The learning rate after ``warmup_steps``; ``warmup_stable_decay`` holds it constant and then lets
        it fall to zero over the last 30 % of the steps.
    :param save_steps: Steps between two checkpoints to resume from.
    :param save_minutes: The most minutes between two checkpoints; null saves by steps alone.
    :param snapshot_steps: Also save the weights after these steps, each in ``step-N`` of the stage's folder: to
        export, or as the ``backbone`` of another run. Under a constant learning rate, and without
        ``group_by_length``, they equal the result of a stage of N steps. Not with an adapter.
    """

    data: DataSettings | None = None
    steps: Positive | None = None
    epochs: Rate | None = None
    min_steps: Positive | None = None
    batch_size: Positive
    adapter: AdapterSettings | None = None
    freeze_vision: bool = False
    freeze_layers: Count = 0
    max_pixels: Positive | None = None
    learning_rate: Rate = 2e-5
    warmup_steps: Count = 100
    weight_decay: Weight = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    schedule: Literal["linear", "cosine", "constant_with_warmup", "warmup_stable_decay"] = "linear"
    logging_steps: Positive = 10
    save_steps: Positive = 500
    save_minutes: Rate | None = 10
    snapshot_steps: tuple[Positive, ...] = ()

    def sizes_at_once(self, rows: int) -> list[int]:
        """Return the possible sizes of a mini-batch, largest first, if a device has ``rows`` rows of a step."""
        return [rows]

    def rows_at_once(self, rows: int) -> int:
        """Return the size of a mini-batch where memory does not decide, if a device has ``rows`` rows of a step."""
        sizes = self.sizes_at_once(rows)
        return next((size for size in sizes if size <= MOST_AUTO_ROWS), sizes[-1])

    @model_validator(mode="after")
    def _check_together(self) -> "StageSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.min_steps is not None and self.epochs is None:
            raise ValueError("min_steps goes with epochs; leave it out when steps is given")
        if self.snapshot_steps and self.adapter is not None:
            raise ValueError("snapshot_steps and adapter exclude each other; remove one of them")
        if self.freeze_layers and self.adapter is not None:
            raise ValueError("freeze_layers and adapter exclude each other; remove one of them")
        return self


class ReconstructionSettings(StageSettings):
    """The settings of a stage that reconstructs masked parts of its rows.

    :param mini_batch_size: Rows that a device runs at once; by default its whole part of the batch. Lower it when
        memory runs out: it does not change what is learned. ``auto``: as many as fit into the device's memory.
    :param group_by_length: Put rows of similar length into one batch, so that there is little padding.
    """

    mini_batch_size: Positive | Auto | None = None
    group_by_length: bool = True

    def sizes_at_once(self, rows: int) -> list[int]:
        """Return the possible sizes of a mini-batch, largest first, if a device has ``rows`` rows of a step."""
        if self.mini_batch_size == "auto":
            return [size for size in range(rows, 0, -1) if rows % size == 0]
        return [min(self.mini_batch_size or rows, rows)]


class PromptSettings(Settings):
    """The instructions that precede the text of queries and of documents."""

    query: str = ""
    document: str = ""


class RunSettings(Settings):
    """The settings of a run, without those of its stages.

    A run whose ``backbone`` is a checkpoint of an earlier run inherits ``prompts``, ``max_length``, ``max_pixels``,
    ``bidirectional``, ``pooling`` and ``eos_tokens`` from it, where they are not given.

    :param name: The name of the run, and by default of its folder in ``runs/``.
    :param backbone: A folder, the name of a backbone of this package, or a hub name.
    :param data: The rows of every stage, where the stage's own ``data`` does not say otherwise.
    :param mixed_precision: ``bf16`` runs forward and backward passes under bfloat16 autocast; trained weights stay
        float32, and weights that an adapter freezes are bfloat16 until it is merged.
    :param attn_implementation: On CUDA, ``flex_attention`` skips what the bridge mask masks out; at short sequences
        sdpa is as fast (docs/experiments.md, section 10).
    :param pooling: What an embedding is, before it is normalised: the last hidden state of ``<EOS>``, or the mean of
        those of all tokens.
    :param eos_tokens: How many ``<EOS>`` end a sequence. Each gives a vector, and the first n vectors are an embedding,
        too; such embeddings are compared by their mean MaxSim. More than one need ``pooling`` eos.
    :param bidirectional: False leaves the language model causal in every stage, for comparison.
    :param gradient_checkpointing: Recompute activations in the backward pass instead of storing them. ``auto``: only if
        they do not fit into the device's memory; on a CPU, never.
    :param vision_cache: A folder that keeps the features that a frozen vision encoder computes of each image, for
        later epochs, stages and runs; several processes may share it.
    :param vision_cache_gb: The maximum size of ``vision_cache`` in gigabytes.
    :param compile: Compile the model's layers; the first steps then take a minute or more. If that fails, the layers
        run uncompiled, with a warning.
    :param sharding: ``fsdp2`` shards weights, gradients and optimiser states over the devices, in stages that allow it.
    :param workers: Processes per device that read and preprocess rows; by default the free cores, at most 8, and none
        without an accelerator.
    :param report_to: Where log lines go, besides the run's own log.
    :param max_length: The maximum number of tokens in a sequence.
    :param max_pixels: Larger images are scaled down to this; by default the backbone's own limit.
    """

    name: str
    backbone: str
    data: DataSettings | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] = "sdpa"
    bidirectional: bool = True
    pooling: Pooling = "eos"
    eos_tokens: Annotated[int, Field(ge=1, le=16)] = 1
    gradient_checkpointing: bool | Auto = False
    vision_cache: Path | None = None
    vision_cache_gb: Rate = 100
    compile: bool = False
    sharding: Literal["none", "fsdp2"] = "none"
    workers: Count | None = None
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    max_length: Positive = 512
    max_pixels: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    prompts: PromptSettings = PromptSettings()

    _expand_home = field_validator("backbone", "vision_cache")(expand_home)

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
            raise ValueError(f"{name!r} cannot name a folder in runs/; use no slashes, and neither . nor ..")
        return name

    @field_validator("eos_tokens")
    @classmethod
    def _refuse_several_means(cls, count: int, info: ValidationInfo) -> int:
        if count > 1 and (pooling := info.data.get("pooling")) != "eos":
            raise ValueError(f"{count} vectors need pooling eos, not {pooling}: a mean is a single vector")
        return count

    @property
    def limits(self) -> dict[str, int | None]:
        """The limits of a sequence, as keyword arguments of ``load_processor`` and ``load_backbone``."""
        return {"max_length": self.max_length, "max_pixels": self.max_pixels, "vectors": self.eos_tokens}
