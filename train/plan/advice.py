"""Warnings before the first step: settings that do not suit a stage's rows, each with what to change."""

from collections.abc import Iterator

import numpy as np

from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.stage import Stage

MOST_EPOCHS = 20


def epoch_count(stage: Stage[StageSettings], rows: RowTable, steps: int) -> float:
    """Return how often ``steps`` steps draw each row."""
    return steps * stage.mean_batch_size(rows) / (len(rows) * stage.passes_per_epoch)


def different_rows(rows: RowTable) -> int:
    """Return the number of distinct rows, by query and positive."""
    pairs = rows.column("query_id") * np.int64(1_000_003) + rows.column("positive_id")
    return _count_different(pairs)


def different_images(rows: RowTable) -> int:
    """Return the number of distinct images that rows begin with."""
    images = rows.column("image_id")
    return _count_different(images[images != 0])


def _count_different(values: np.ndarray) -> int:
    ordered = np.sort(values)  # quicker than np.unique for a million values
    return len(values[:1]) + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


def advise(stage: Stage[StageSettings], rows: RowTable, steps: int) -> Iterator[str]:
    """Yield one sentence for each setting that does not suit the stage's rows."""
    name, settings = stage.name, stage.settings
    epochs, different = epoch_count(stage, rows, steps), different_rows(rows)
    length = f"{name}.steps" if settings.epochs is None else f"{name}.epochs or {name}.min_steps"
    shortest = epoch_count(stage, rows, stage.fewest_steps)
    if shortest > MOST_EPOCHS:
        yield (
            f"Stage {name} has {len(rows):,} rows, too few for the {stage.fewest_steps} steps that it takes to leave "
            f"its plateau: they would draw each row {shortest:,.0f} times; give it more rows, lower {name}.batch_size, "
            f"or leave the stage out with {name}=null."
        )
    elif steps < stage.fewest_steps:
        yield (
            f"Stage {name} ends at step {steps}, before its loss can leave the plateau; raise {length} to "
            f"{stage.fewest_steps} steps or more, or lower {name}.batch_size."
        )
    if epochs > MOST_EPOCHS >= shortest:
        fewer = int(steps * MOST_EPOCHS / epochs)
        yield (
            f"Stage {name} draws each of its {len(rows):,} rows {epochs:,.0f} times; more than {MOST_EPOCHS} epochs "
            f"overfit: set {name}.steps={max(fewer, 1)}, or give it more rows."
        )
    if settings.warmup_steps >= steps:
        yield (
            f"The learning rate of stage {name} rises for {settings.warmup_steps} steps, but the stage has {steps}; "
            f"lower {name}.warmup_steps."
        )
    yield from stage.row_warnings(rows)
    if stage.accumulates and settings.batch_size > different:
        yield (
            f"A batch of stage {name} has {settings.batch_size:,} rows, but the stage has only {different:,} different "
            f"rows; lower {name}.batch_size."
        )
