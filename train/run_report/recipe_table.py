"""A recipe as people read it: what somebody has chosen first, then the rest, then the file to run it again."""

from collections.abc import Mapping
from typing import Any, get_args

import yaml

from cocoa_embed.errors import UsageError
from cocoa_embed.report.content import RecipeTable
from cocoa_embed.train.recipe import STAGES, Recipe
from cocoa_embed.train.run_report.finished_run import FinishedRun, without_defaults
from cocoa_embed.train.settings import SOURCE_KINDS, Settings, SourceSettings

ABSENT = "–"


def recipe_table(run: FinishedRun) -> RecipeTable:
    """Return a run's recipe; the data have a section of their own."""
    recipe, stages = run.recipe, run.stages
    whole = [(key, words(value)) for key, value in recipe.items() if key not in {*STAGES, "data", "prompts", "name"}]
    prompts = [(f"prompts.{role}", text) for role, text in (recipe.get("prompts") or {}).items()]
    keys = list(dict.fromkeys(key for stage in stages for key in recipe[stage] if key != "data"))
    chosen, defaults = [], []
    for key in keys:
        values = [recipe[stage].get(key) for stage in stages]
        row = (key, [ABSENT if value is None else words(value) for value in values])
        if any(value != _default(stage, key) for stage, value in zip(stages, values, strict=True) if value is not None):
            chosen.append(row)
        elif any(value is not None for value in values):
            defaults.append(row)
    shown = [(key, value) for key, value in [*whole, *prompts] if value]
    return RecipeTable(shown, stages, chosen, defaults, recipe_yaml(run))


def _default(stage: str, key: str) -> Any:  # noqa: ANN401  a recipe's value, of any kind
    (settings,) = (kind for kind in get_args(Recipe.model_fields[stage].annotation) if kind is not type(None))
    known = settings.model_fields.get(key)
    return None if known is None else known.default


def words(value: object) -> str:
    """Return a recipe's value as people read it; nothing for what is not there."""
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(each)}" for key, each in value.items() if each is not None)
    if isinstance(value, list | tuple):
        return ", ".join(words(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def source_words(source: SourceSettings) -> str:
    """Return where rows are from, and how they were taken from there."""
    given = source.model_dump(mode="json", exclude_defaults=True)
    kind = next((kind for kind in SOURCE_KINDS if kind in given), None)
    told = [f"{kind} {given.pop(kind)}"] if kind else []
    return "; ".join([*told, *(f"{key}: {words(value)}" for key, value in given.items())])


def recipe_yaml(run: FinishedRun) -> str:
    """Return the recipe as a file that runs again what was run, without what is as by default.

    Each stage has its own data, as it was written down with its rows: a recipe once written does not tell what a stage
    took from the recipe's own. Nothing where a run of an earlier version does not tell it either, or has a recipe that
    this version does not know.
    """
    if any(run.rows.get(stage) is None or run.rows[stage].sources is None for stage in run.stages):
        return ""
    recipe = without_defaults(run.recipe)
    try:
        parsed = Recipe.parse(recipe)
    except UsageError:
        return ""
    data = {stage: _stage_data(run, stage, parsed) for stage in run.stages}
    values: dict[str, Any] = {
        key: value for key, value in recipe.items() if key not in {*STAGES, "data"} and value != _recipe_default(key)
    }
    for stage in run.stages:
        section = {key: value for key, value in run.recipe[stage].items() if value != _default(stage, key)}
        section.pop("data", None)
        values[stage] = {"data": data[stage], **section}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _recipe_default(key: str) -> Any:  # noqa: ANN401  a recipe's value, of any kind
    known = Recipe.model_fields.get(key)
    default = None if known is None else known.default
    if isinstance(default, Settings):
        return default.model_dump(mode="json")
    return list(default) if isinstance(default, tuple) else default


def _stage_data(run: FinishedRun, stage: str, recipe: Recipe) -> dict[str, Any]:
    sources = {
        name: source.model_dump(mode="json", exclude_defaults=True)
        for name, source in (run.rows[stage].sources or {}).items()
    }
    how = recipe.data_of(stage).model_dump(mode="json", include={"on_bad_row"})
    return {**how, **(sources["data"] if set(sources) == {"data"} else {"subsets": sources})}
