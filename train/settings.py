"""The parts of a recipe: what may be written in one, and what it means."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cocoa_embed.train.stages.masking import PatchFill

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
CaptionChoice = Literal["text", "captions"]


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnsSection(Section):
    """Which column of a table holds which part of a row; a part without a column is not there.

    A negative's column may hold one value or a list of them, in a CSV file as JSON. An image is a path, or the bytes of
    a file inside the table.
    """

    query_text: str | None = None
    query_image: str | None = None
    positive_text: str | None = None
    positive_image: str | None = None
    negative_text: str | None = None
    negative_image: str | None = None


class SourceSection(Section):
    """Where rows come from: one of ``folder``, ``file``, ``mmeb`` and ``hub``.

    :param folder: An image folder with ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``.
    :param file: A ``.jsonl``, ``.csv`` or ``.parquet`` file, or a glob of such files; ``columns`` says what is in it.
    :param mmeb: The MMEB-train layout: a folder, or a name on the hub. Without ``subsets``, its 20 in-domain subsets.
    :param hub: A data set on the hub, or a folder that ``datasets`` reads or wrote; ``columns`` says what is in it.
    :param columns: By default, the columns that are called as the keys of ``ColumnsSection``.
    :param config: The configuration of a ``hub`` or ``mmeb`` data set; for a subset of ``mmeb``, its name by default.
    :param split: The split of a ``hub`` or ``mmeb`` data set; ``train`` also stands for MMEB-train's ``original``.
    :param images: The folder that relative image paths start from; by default that of the file, or of the data set. On
        the hub, ``mmeb`` needs it: its images are not part of the data set.
    :param captions: For image folders: a row for each image's ``text``, or for each entry of its ``captions``.
    :param paraphrases: For image folders: text-only rows for each image, from one of its ``captions`` to another.
    :param limit: The first so many entries (images of a folder, rows of anything else); all by default.
    :param weight: How many times each row is drawn where others are drawn once. A share of the rows, drawn by the
        recipe's seed, stands for a fraction.
    """

    folder: Path | None = None
    file: str | None = None
    mmeb: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    images: Path | None = None
    columns: ColumnsSection | None = None
    captions: CaptionChoice = "text"
    paraphrases: Count = 0
    limit: Positive | None = None
    weight: Rate = 1.0

    @model_serializer(mode="wrap")
    def _as_given(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not given: it is taken from the section around, and a default would stand in its way."""
        return {key: value for key, value in serialise(self).items() if key in self.model_fields_set}


class DataSection(SourceSection):
    """Which rows a stage sees: those of one source, or of several ``subsets``, by name.

    What a stage's section leaves out is taken from the recipe's own, and what a subset leaves out from the section that
    it stands in; the innermost section that names a source decides on it.

    :param on_bad_row: ``stop`` ends the run at a row that cannot be used; ``skip`` leaves it out and lists it in
        ``bad_rows.jsonl``, as long as at most 1 % of a stage's rows are such.
    """

    subsets: dict[str, SourceSection] | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"


class AdapterSection(Section):
    """Train low-rank matrices beside the weights, merged into them at the stage's end.

    :param vision: Adapt the vision encoder too, not the language model alone; by default, unless ``freeze_vision``.
    """

    kind: Literal["lora", "dora"] = "dora"
    r: Positive = 8
    alpha: Positive = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    init: Literal["gaussian", "kaiming"] = "gaussian"
    vision: bool | None = None


class StageSection(Section):
    """What every stage has: its data and its optimisation.

    :param steps: Optimisation steps; or give ``epochs``.
    :param batch_size: Rows of a step, over all devices.
    :param adapter: Train adapters instead of the weights themselves.
    :param freeze_vision: Leave the vision encoder as it is.
    :param warmup_steps: Steps in which the learning rate rises.
    :param schedule: Of the learning rate after ``warmup_steps``; ``warmup_stable_decay`` holds it and lets it fall to
        zero over the last 30 % of the steps.
    :param save_steps: Steps between two checkpoints to resume from.
    :param keep_steps: Steps after which the weights are kept too, each in ``step-N`` of the stage's folder: checkpoints
        to export, or to start another stage from. Under a learning rate that is held, and without ``group_by_length``,
        they are what a stage of N steps would leave. Not with an adapter, which is merged at the end alone.
    """

    data: DataSection | None = None
    steps: Positive | None = None
    epochs: Rate | None = None
    batch_size: Positive
    adapter: AdapterSection | None = None
    freeze_vision: bool = False
    learning_rate: Rate = 2e-5
    warmup_steps: Count = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    schedule: Literal["linear", "cosine", "constant_with_warmup", "warmup_stable_decay"] = "linear"
    logging_steps: Positive = 10
    save_steps: Positive = 500
    keep_steps: tuple[Positive, ...] = ()

    @property
    def adapts_vision(self) -> bool:
        """Whether the stage's adapter, if it has one, is in the vision encoder too."""
        if self.adapter is None:
            return False
        return not self.freeze_vision if self.adapter.vision is None else self.adapter.vision

    @model_validator(mode="after")
    def _has_a_length(self) -> "StageSection":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of the two")
        return self

    @model_validator(mode="after")
    def _keeps_what_it_can(self) -> "StageSection":
        if self.keep_steps and self.adapter is not None:
            raise ValueError("keep_steps and an adapter do not go together; leave one of them out")
        return self

    @model_validator(mode="after")
    def _freezes_or_adapts_vision(self) -> "StageSection":
        if self.freeze_vision and self.adapter is not None and self.adapter.vision:
            raise ValueError("freeze_vision and adapter.vision are both true; set one of them to false")
        return self


class ReconstructionSection(StageSection):
    """What the first two stages have.

    :param micro_batch_size: Rows that a device runs at once; the gradients of several such make a step.
    :param group_by_length: Put rows of similar length into one batch, so that little is padded.
    """

    micro_batch_size: Positive | None = None
    group_by_length: bool = True


class WarmupSection(ReconstructionSection):
    """Stage 1."""

    text_mask_ratio: Share = 0.2
    image_mask_ratio: Share = 0.5
    patch_fill: PatchFill = "noise"
    mae_weight: Annotated[float, Field(ge=0)] = 0.5
    normalise_targets: bool = False


class BridgeSection(ReconstructionSection):
    """Stage 2.

    :param probe_rows: Rows kept out of training to measure, every ``probe_steps`` steps, what ``<EOS>`` carries and how
        the embeddings lie.
    """

    mask_ratio: Share = 0.7
    eos_attends_to_b: bool = True
    probe_rows: Count = 64
    probe_steps: Positive = 50


class ContrastiveSection(StageSection):
    """Stage 3.

    :param cache_chunk: Items that a device runs at once; gradients are cached, so that the batch may be larger.
    :param both_directions: Train each pair from either side, as two subsets.
    :param symmetric: Let each positive look for its query too, in the same loss.
    :param hard_negatives: How many of a row's own negatives to use, at most. They are candidates of every query of the
        batch, and rows that share one do not meet in a batch.
    :param matryoshka_dims: Lengths at which the first values of an embedding are embeddings themselves; the whole is
        always among them.
    :param probe_rows: How many pairs to measure the embeddings' geometry on, every ``probe_steps`` steps: the first
        with an image, one for each image. They are trained on, so the figures tell how training goes and are no
        scores. 0 turns it off, and so do fewer than two images.
    :param one_subset_a_batch: Draw each batch from one subset, so that its negatives are of one kind; otherwise from
        all rows, both directions mixed.
    """

    temperature: Rate = 0.02
    cache_chunk: Positive = 8
    both_directions: bool = True
    symmetric: bool = False
    hard_negatives: Count = 0
    matryoshka_dims: list[Positive] | None = None
    one_subset_a_batch: bool = True
    probe_rows: Count = 64
    probe_steps: Positive = 50


class PromptsSection(Section):
    """Instructions put before the text of queries and of documents."""

    query: str = ""
    document: str = ""
