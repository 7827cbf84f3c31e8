"""What a run is: a recipe, validated, from YAML and the command line's overrides."""

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from cocoa_embed.errors import UsageError
from cocoa_embed.train.corruption import PatchFill
from cocoa_embed.train.data import CaptionChoice

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]

YAML_NULLS = ("", "~", "null")


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """Which rows a stage sees: an image folder with ``metadata.jsonl``.

    What a stage's section leaves out is taken from the recipe's own.

    :param captions: A row for each image's ``text``, or for each entry of its ``captions``.
    :param paraphrases: Text-only rows for each image, from one of its ``captions`` to another.
    :param limit: The first so many images; all by default.
    """

    folder: Path | None = None
    captions: CaptionChoice = "text"
    paraphrases: Annotated[int, Field(ge=0)] = 0
    limit: Positive | None = None


class StageSection(Section):
    """What every stage has: its data and its optimisation. Lengths in steps.

    :param schedule: Of the learning rate after ``warmup_steps``; ``warmup_stable_decay`` holds it and lets it fall to
        zero over the last 30 % of the steps.
    """

    data: DataSection | None = None
    steps: Positive
    batch_size: Positive
    learning_rate: Rate = 2e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    schedule: Literal["linear", "cosine", "constant_with_warmup", "warmup_stable_decay"] = "linear"
    logging_steps: Positive = 10


class WarmupSection(StageSection):
    """Stage 1."""

    text_mask_ratio: Share = 0.2
    image_mask_ratio: Share = 0.5
    patch_fill: PatchFill = "noise"
    mae_weight: Annotated[float, Field(ge=0)] = 0.5
    normalise_targets: bool = False


class BridgeSection(StageSection):
    """Stage 2. ``probe_rows``: rows kept to measure what ``<EOS>`` carries, every ``probe_steps`` steps."""

    mask_ratio: Share = 0.7
    eos_attends_to_b: bool = True
    probe_rows: Annotated[int, Field(ge=0)] = 64
    probe_steps: Positive = 50


class ContrastiveSection(StageSection):
    """Stage 3. ``both_directions`` trains each pair from either side, as two subsets."""

    temperature: Rate = 0.02
    cache_chunk: Positive = 8
    both_directions: bool = True
    symmetric: bool = False


class PromptsSection(Section):
    """Instructions put before the text of queries and of documents."""

    query: str = ""
    document: str = ""


class Recipe(Section):
    """A whole run. A stage that is left out is not run.

    :param backbone: A folder, the name of one of this package's backbones, or a hub name.
    :param data: The rows of every stage, as far as its own section does not say otherwise.
    :param mixed_precision: ``bf16`` runs forward and backward passes under bfloat16 autocast; weights stay float32.
    :param max_length: Tokens of the longest sequence.
    :param max_pixels: Larger images are scaled down to this many pixels; the backbone's own limit by default.
    """

    name: str
    backbone: str
    data: DataSection | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    max_length: Positive = 512
    max_pixels: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    prompts: PromptsSection = PromptsSection()
    warmup: WarmupSection | None = None
    bridge: BridgeSection | None = None
    contrastive: ContrastiveSection | None = None

    def data_of(self, stage: str) -> DataSection:
        """Return the data of a stage: its own section's values over the recipe's."""
        section: StageSection = getattr(self, stage)
        given = [data.model_dump(exclude_unset=True) for data in (self.data, section.data) if data is not None]
        return DataSection(**{key: value for values in given for key, value in values.items()})

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: list[str] | None = None) -> "Recipe":
        """Read a recipe file, or one of this package's by name, and apply ``key.sub=value`` overrides.

        :raises UsageError: If there is no such recipe, a key is not known (the nearest is named), or a value is wrong.
        """
        path = _find_recipe(str(name_or_path))
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise UsageError(f"{path} holds no recipe; expected keys such as {', '.join(cls.model_fields)}.")
        for override in overrides or []:
            _apply_override(values, override)
        return cls.parse(values, source=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], *, source: str = "recipe") -> "Recipe":
        """Validate ``values``.

        :raises UsageError: With one sentence for each fault.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UsageError(f"{source}: {'; '.join(_describe(fault) for fault in error.errors())}.") from error


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files("cocoa_embed.train.recipes").iterdir()
        if entry.name.endswith(".yaml")
    )


def _find_recipe(name_or_path: str) -> Path:
    if name_or_path in recipe_names():
        return Path(str(files("cocoa_embed.train.recipes") / f"{name_or_path}.yaml"))
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise UsageError(
        f"No recipe {name_or_path!r}: it is no file and none of this package's ({', '.join(recipe_names())})."
    )


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"Override {override!r} is not of the form key.sub=value.")
    *parents, last = key.split(".")
    if _takes_text(parents, last) and text not in YAML_NULLS and text[0] not in "\"'":
        text = yaml.safe_dump(text)
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UsageError(f"Override {override!r}: {parent} is a value and has no keys of its own.")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"Override {override!r}: {text!r} is not a YAML value.") from error


def _takes_text(parents: list[str], last: str) -> bool:
    """Tell whether a key holds words or a path, which YAML would take for a number, a date or a mapping."""
    section = _SECTION_OF_KEY.get(parents[-1]) if parents else Recipe
    annotation = section.model_fields[last].annotation if section and last in section.model_fields else None
    alternatives = get_args(annotation) or (annotation,)
    return any(alternative in (str, Path) or isinstance(alternative, str) for alternative in alternatives)


def _describe(fault: ErrorDetails) -> str:
    location = [str(part) for part in fault["loc"]]
    name = ".".join(location)
    if fault["type"] == "extra_forbidden":
        known = list(_section_at(location[:-1]).model_fields)
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        return f"unknown key {name!r} ({hint})"
    if fault["type"] == "missing":
        return f"key {name!r} is missing"
    return f"{name} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


_SECTION_OF_KEY: dict[str, type[Section]] = {
    "data": DataSection,
    "warmup": WarmupSection,
    "bridge": BridgeSection,
    "contrastive": ContrastiveSection,
    "prompts": PromptsSection,
}


def _section_at(location: list[str]) -> type[Section]:
    return _SECTION_OF_KEY[location[-1]] if location else Recipe
