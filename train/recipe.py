"""What a run is: a recipe, validated, from YAML and the command line's overrides."""

import difflib
import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from cocoa_embed.data.mmeb import default_train_subsets
from cocoa_embed.errors import UsageError
from cocoa_embed.train.settings import (
    BridgeSection,
    ContrastiveSection,
    Count,
    DataSection,
    Positive,
    PromptsSection,
    Section,
    SourceSection,
    StageSection,
    WarmupSection,
)

YAML_NULLS = ("", "~", "null")


STAGES = ("warmup", "bridge", "contrastive")
"""The stages in their order, as recipes name them."""

SOURCE_KINDS = ("folder", "file", "mmeb", "hub")
"""The keys of ``SourceSection`` that each say by themselves where rows are."""

_OF_ONE_SOURCE = {*SOURCE_KINDS, "subsets", "config", "split", "images", "columns", "captions", "paraphrases"}
"""What says nothing of another source than its own."""


def _merged(outer: SourceSection | None, inner: SourceSection | None) -> dict[str, Any]:
    """Return the keys given in ``inner`` over those in ``outer``; a source in ``inner`` replaces the outer whole."""
    over, under = ({} if section is None else section.model_dump(exclude_unset=True) for section in (inner, outer))
    if all(any(given.get(kind) is not None for kind in (*SOURCE_KINDS, "subsets")) for given in (over, under)):
        under = {key: value for key, value in under.items() if key not in _OF_ONE_SOURCE}
    return {**under, **over}


class Recipe(Section):
    """A whole run. A stage that is left out is not run.

    :param name: The name of the run and, inside of ``runs/``, of its folder where no other is given.
    :param backbone: A folder, the name of one of this package's backbones, or a hub name.
    :param data: The rows of every stage, as far as its own section does not say otherwise.
    :param mixed_precision: ``bf16`` runs forward and backward passes under bfloat16 autocast; weights stay float32.
    :param attn_implementation: ``auto`` is FlexAttention for the bridge's mask on CUDA, and sdpa anywhere else.
    :param bidirectional: False leaves the language model causal in every stage, to measure what its being bidirectional
        is worth.
    :param gradient_checkpointing: Compute activations anew in the backward pass instead of keeping them.
    :param sharding: ``fsdp2`` spreads weights, gradients and optimiser states of the first two stages over the devices.
    :param workers: Processes that read and preprocess rows, for each device; by default the cores to spare, at most 8,
        and none without an accelerator.
    :param report_to: Where log lines go beside ``log.json``.
    :param max_length: Tokens of the longest sequence.
    :param max_pixels: Larger images are scaled down to this many pixels; the backbone's own limit by default.
    """

    name: str
    backbone: str
    data: DataSection | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    bidirectional: bool = True
    gradient_checkpointing: bool = False
    sharding: Literal["none", "fsdp2"] = "none"
    workers: Count | None = None
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    max_length: Positive = 512
    max_pixels: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    prompts: PromptsSection = PromptsSection()
    warmup: WarmupSection | None = None
    bridge: BridgeSection | None = None
    contrastive: ContrastiveSection | None = None

    @field_validator("name")
    @classmethod
    def _is_the_name_of_a_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
            raise ValueError(f"{name!r} cannot name a folder in runs/; leave out slashes, and do not take . or ..")
        return name

    def data_of(self, stage: str) -> DataSection:
        """Return the data of a stage: its own section's values over the recipe's."""
        return DataSection(**_merged(self.data, self.section(stage).data))

    def sources_of(self, stage: str) -> dict[str, SourceSection]:
        """Return the sources of a stage's rows by the names of its subsets; one source alone has the name ``data``.

        The ``mmeb`` layout without ``subsets`` or ``config`` stands for its in-domain subsets, by their own names.

        :raises UsageError: If a source names nothing to read, or several things.
        """
        data = self.data_of(stage)
        whole = SourceSection(**data.model_dump(exclude_unset=True, include=set(SourceSection.model_fields)))
        if data.subsets is None:
            names = default_train_subsets(whole.mmeb) if whole.mmeb is not None and whole.config is None else ()
            sources = dict.fromkeys(names or ("data",), whole)
        else:
            sources = {name: SourceSection(**_merged(whole, subset)) for name, subset in data.subsets.items()}
        for name, source in sources.items():
            given = [kind for kind in SOURCE_KINDS if getattr(source, kind) is not None]
            if len(given) != 1:
                raise UsageError(
                    f"Recipe {self.name!r}, stage {stage}, {name}: "
                    + (f"{' and '.join(given)} are both given" if given else "no data")
                    + f"; give one of {', '.join(f'data.{kind}' for kind in SOURCE_KINDS)}."
                )
        return sources

    @property
    def stages(self) -> list[str]:
        """The stages that the recipe runs, in their order."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]

    def section(self, stage: str) -> StageSection:
        """Return the section of a stage that the recipe runs."""
        section: StageSection = getattr(self, stage)
        return section

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
        # What stands at several places by a YAML alias is one object until here.
        values = json.loads(json.dumps(values, default=str))
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
    if _takes_text([*parents, last]) and text not in YAML_NULLS and text[0] not in "\"'":
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


def _takes_text(location: list[str]) -> bool:
    """Tell whether a key holds words or a path, which YAML would take for a number, a date or a mapping."""
    section = _section_at(location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    if field is None:
        return False
    alternatives = get_args(field.annotation) or (field.annotation,)
    return any(alternative in (str, Path) or isinstance(alternative, str) for alternative in alternatives)


def _section_at(location: list[str]) -> type[Section] | None:
    """Return the section that stands at a place of a recipe; None where there is none."""
    section: type[Section] = Recipe
    keys = iter(location)
    for key in keys:
        field = section.model_fields.get(key)
        inner = _section_within(field.annotation) if field else None
        if inner is None:
            return None
        section, is_named = inner
        if is_named:
            next(keys, None)
    return section


def _section_within(annotation: object) -> tuple[type[Section], bool] | None:
    """Return the section that a field's annotation holds, and whether it holds several, by name."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return (annotation, False) if issubclass(annotation, Section) else None
    is_mapping = get_origin(annotation) is dict
    found = [inner for argument in get_args(annotation) if (inner := _section_within(argument))]
    return (found[0][0], is_mapping or found[0][1]) if found else None


def _describe(fault: ErrorDetails) -> str:
    location = [str(part) for part in fault["loc"]]
    name = ".".join(location)
    if fault["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        known = list(section.model_fields) if section else []
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        return f"unknown key {name!r} ({hint})"
    if fault["type"] == "missing":
        return f"key {name!r} is missing"
    if fault["type"] == "value_error":
        return f"{name}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{name} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
