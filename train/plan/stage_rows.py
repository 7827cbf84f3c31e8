"""Read the rows of a run's stages: those that each stage can use, at most ``max_rows``."""

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from cocoa_embed.errors import UsageError
from cocoa_embed.model.backbone import load_processor
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.model.template import eos_tokens
from cocoa_embed.train.data.image_check import ImageCheck
from cocoa_embed.train.data.mixture import Check, ReadRows, read_rows
from cocoa_embed.train.loop.arguments import checking_worker_count
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.rendering import row_images
from cocoa_embed.train.stages.stage import Stage


def read_stages(
    recipe: Recipe, names: list[str], *, check: Check = "all", left_out: Collection[tuple[str, str]] | None = None
) -> dict[str, ReadRows]:
    """Read the rows of stages. Data that several stages share are read once, and each image is checked once.

    :param check: Check all images, or a sample of them.
    :param left_out: The subsets and sources of rows that a resumed run has left out.
    :raises UsageError: If a stage cannot train on its rows.
    :raises CocoaError: If the data cannot be used.
    """
    read: dict[str, ReadRows] = {}
    images = ImageCheck()
    rows = {}
    for name in names:
        stage, data = recipe.stages[name], recipe.data_of(name)
        key = data.model_dump_json()
        if key not in read:
            read[key] = read_rows(
                recipe.sources_of(name),
                on_bad_row=data.on_bad_row,
                seed=recipe.seed,
                workers=checking_worker_count(recipe),
                images=images,
                check=check,
                left_out=left_out,
            )
        rows[name] = _capped(_usable(stage, read[key]), data.max_rows, recipe.seed)
        stage.check_rows(rows[name].rows)
        refuse_long_rows(stage, rows[name])
    return rows


def refuse_long_rows(stage: Stage[StageSettings], read: ReadRows) -> None:
    """Check that the images of a row fit into a sequence together, where they share one; a single image always fits.

    Images that were not checked are not counted, as their sizes are unknown.

    :raises UsageError: If the images of a row do not fit.
    """
    images = read.rows.column("images")
    several = stage.joined_rows(read.rows) & (images > 1)
    if not several.any():
        return
    processor = load_processor(stage.run.backbone, **stage.run.limits)
    family, limit = family_of_images(processor), processor.tokenizer.model_max_length
    around, ends = family.markers.around, len(eos_tokens(processor.tokenizer))
    if images.max() * (family.most_visual_tokens(processor) + around) + ends <= limit:
        return
    sizes, size_of = np.unique(read.sizes.sizes, axis=0, return_inverse=True)
    tokens = np.array([family.visual_tokens(processor, *size) + around for size in sizes.tolist()], np.int64)
    needed = read.rows.image_sums(read.sizes.ids, tokens[size_of.ravel()]) + ends
    if len(long := np.flatnonzero(several & (needed > limit))):
        row = read.rows[int(long[0])]
        raise UsageError(
            f"The {len(row_images(row))} images of {row.source} take {needed[long[0]]} tokens together in stage "
            f"{stage.name}, more than max_length {limit}; lower max_pixels or raise max_length."
        )


def _usable(stage: Stage[StageSettings], read: ReadRows) -> ReadRows:
    """Return the rows that a stage can use, and the number of the others by subset.

    :raises UsageError: If there are none.
    """
    rows, usable = read.rows, stage.usable(read.rows)
    if usable.all():
        return read
    if not usable.any():
        raise UsageError(f"Stage {stage.name} can use none of its {len(rows):,} rows: {stage.needs}.")
    kept, left_out = (rows.select(np.flatnonzero(chosen)) for chosen in (usable, ~usable))
    return replace(read, rows=kept, left_out=left_out.counts)


def _capped(read: ReadRows, max_rows: int | None, seed: int) -> ReadRows:
    """Return at most ``max_rows`` rows, drawn by the seed, in order."""
    if max_rows is None or len(read.rows) <= max_rows:
        return read
    drawn = np.random.default_rng(seed).choice(len(read.rows), max_rows, replace=False)
    return replace(read, rows=read.rows.select(np.sort(drawn)))
