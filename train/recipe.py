"""A recipe describes a whole run: it is read from YAML and overrides, and validated, without torch."""

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from typing_extensions import Self

from cocoa_embed.data.mmeb import default_train_subsets
from cocoa_embed.errors import CocoaError, UsageError, did_you_mean, one_line, printable
from cocoa_embed.images.find_files import match_pattern
from cocoa_embed.train.settings import (
    SOURCE_KINDS,
    DataSettings,
    RunSettings,
    Settings,
    SourceSettings,
    StageSettings,
    expand_home,
)
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.moca.settings import MocaSettings
from cocoa_embed.train.stages.warmup.settings import WarmupSettings

if TYPE_CHECKING:
    from cocoa_embed.train.stages.stage import Stage

RECIPES = Path(__file__).parent / "recipes"
YAML_NULLS = ("", "~", "null")
LOCAL_PREFIXES = (".", "/", "~")
"""A name that begins like this is a path, and not a name on the hub."""

UNION_MEMBERS = frozenset({"bool", "constrained-int", "literal['auto']"})
"""What pydantic adds to the location of a setting that also takes ``auto``."""

OTHER_LENGTH = {"steps": ("epochs", "min_steps"), "epochs": ("steps",)}
"""The keys that set the length of a stage, and the keys that an override of each one removes."""

_OF_ONE_SOURCE = {"subsets", *SourceSettings.model_fields} - {"limit", "limit_order", "weight"}
"""The keys that describe one particular source; the others say how rows are drawn from any source."""


class RecipeLoader(yaml.SafeLoader):
    """Keeps keys as the strings that are written: YAML reads ``no`` as a truth value, and 2024-05-01 as a date."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what ``<<`` names into a mapping, and make its keys strings."""
        super().flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"


def read_yaml(text: str) -> Any:  # noqa: ANN401
    """Parse YAML; the keys of its mappings are strings.

    :raises yaml.YAMLError: If the text is not valid YAML.
    """
    return yaml.load(text, RecipeLoader)


class Recipe(RunSettings):
    """A whole run: its settings, and those of its stages in order; a stage that is left out is not run.

    This is the registry of stages, one line each: the settings, and where the ``Stage`` is, which needs torch.
    """

    warmup: Annotated[WarmupSettings | None, "cocoa_embed.train.stages.warmup.stage:Warmup"] = None
    moca: Annotated[MocaSettings | None, "cocoa_embed.train.stages.moca.stage:Moca"] = None
    bridge: Annotated[BridgeSettings | None, "cocoa_embed.train.stages.bridge.stage:Bridge"] = None
    contrastive: Annotated[ContrastiveSettings | None, "cocoa_embed.train.stages.contrastive.stage:Contrastive"] = None

    @classmethod
    def registry(cls) -> dict[str, str]:
        """Return the ``module:Class`` of each known stage by the stage's key, in the order of the stages."""
        return {
            key: place for key, field in cls.model_fields.items() for place in field.metadata if isinstance(place, str)
        }

    @property
    def stages(self) -> "dict[str, Stage[StageSettings]]":
        """The stages that the recipe runs, by key, in order."""
        stages = {}
        for key, place in self.registry().items():
            if (settings := getattr(self, key)) is not None:
                run = self.model_copy(update={"max_pixels": settings.max_pixels or self.max_pixels})
                stages[key] = resolve_name(place)(key, settings, run)
        return stages

    def data_of(self, stage: str) -> DataSettings:
        """Return the data of a stage: its own settings over the recipe's."""
        return DataSettings(**_merged(self.data, getattr(self, stage).data))

    def sources_of(self, stage: str) -> dict[str, SourceSettings]:
        """Return the sources of a stage's rows by the names of its subsets; a single source is called ``data``.

        An ``mmeb`` source without ``subsets`` and ``config`` stands for its in-domain subsets, by their names.

        :raises UsageError: If a source gives none of ``SOURCE_KINDS``, or several.
        """
        sources = _sources(self.data_of(stage))
        for name, source in sources.items():
            given = [kind for kind in SOURCE_KINDS if getattr(source, kind) is not None]
            if len(given) != 1:
                raise UsageError(
                    f"Recipe {self.name!r}, stage {stage}, {name}: "
                    + (f"{' and '.join(given)} are both given" if given else "no data")
                    + f"; give one of {', '.join(f'data.{kind}' for kind in SOURCE_KINDS)}."
                )
        return sources

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: list[str] | None = None, *, check_paths: bool = False) -> Self:
        """Read a recipe file, or a recipe of this package by name, and apply ``key.sub=value`` overrides.

        :param check_paths: Also check that local files and folders exist.
        :raises UsageError: With one sentence for each fault: unknown keys with the closest known one, wrong values,
            missing files; or if there is no recipe of this name.
        """
        path = _find_recipe(str(name_or_path))
        try:
            values = read_yaml(path.read_text(encoding="utf-8"))
            # A YAML alias is the same object in several places; the copy makes it a separate one in each.
            values = json.loads(json.dumps(values, default=str))
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror})") from error
        except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an alias inside its own value
            raise UsageError(f"{path} is not valid YAML: {one_line(error)}") from error
        if not isinstance(values, dict):
            raise UsageError(f"{path} is not a recipe; expected keys such as {', '.join(cls.model_fields)}.")
        for override in overrides or []:
            apply_override(cls, values, override)
        # A recipe of this package is not the user's file: its name says enough.
        source = f"recipe {name_or_path}" if path.parent == RECIPES else str(path)
        return cls.parse(values, source=source, check_paths=check_paths)

    @classmethod
    def parse(cls, values: dict[str, Any], *, source: str = "recipe", check_paths: bool = False) -> Self:
        """Validate ``values``.

        :param check_paths: Also check that local files and folders exist.
        :raises UsageError: With one sentence for each fault.
        :raises CocoaError: If only files or folders are missing.
        """
        missing = missing_paths(cls, values) if check_paths else []
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            faults = [*(describe_fault(cls, fault) for fault in error.errors()), *missing]
            raise UsageError(f"{source}: {'; '.join(faults)}.") from error
        if missing:
            raise CocoaError(f"{source}: {'; '.join(missing)}.")
        return recipe


STAGES = tuple(Recipe.registry())
"""The keys of the stages, in their order."""


def _merged(outer: SourceSettings | None, inner: SourceSettings | None) -> dict[str, Any]:
    """Return the keys given in ``inner`` over those in ``outer``; a source in ``inner`` replaces the outer one."""
    over, under = ({} if given is None else given.model_dump(exclude_unset=True) for given in (inner, outer))
    if all(any(given.get(kind) is not None for kind in (*SOURCE_KINDS, "subsets")) for given in (over, under)):
        under = {key: value for key, value in under.items() if key not in _OF_ONE_SOURCE}
    return {**under, **over}


def _sources(data: DataSettings) -> dict[str, SourceSettings]:
    whole = SourceSettings(**data.model_dump(exclude_unset=True, include=set(SourceSettings.model_fields)))
    if data.subsets is None:
        names = default_train_subsets(whole.mmeb) if whole.mmeb is not None and whole.config is None else ()
        return dict.fromkeys(names or ("data",), whole)
    return {name: SourceSettings(**_merged(whole, subset)) for name, subset in data.subsets.items()}


def missing_paths(recipe: type[Recipe], values: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each local file or folder that a recipe's stages name and that does not exist.

    :param values: The recipe's values, valid or not; invalid ones are skipped.
    """
    missing = []
    for key in recipe.registry():
        if isinstance(given := values.get(key), Mapping):
            merged = _merged(_valid_data(values.get("data")), _valid_data(given.get("data")))
            for source in _sources(DataSettings(**merged)).values():
                missing += [f"data.{kind} {printable(path)} does not exist" for kind, path in _missing(source)]
    if isinstance(given := values.get("backbone"), str) and not os.path.isdir(backbone := expand_home(given)):
        built_in = [entry.name for entry in (files("cocoa_embed") / "backbones").iterdir() if entry.is_dir()]
        if backbone.startswith(LOCAL_PREFIXES) or ("/" not in backbone and backbone not in built_in):
            missing.append(f"backbone {printable(backbone)} does not exist {did_you_mean(backbone, built_in)}")
    return list(dict.fromkeys(missing))


def _valid_data(values: object) -> DataSettings | None:
    try:
        return DataSettings.model_validate(values)
    except ValidationError:
        return None


def _missing(source: SourceSettings) -> list[tuple[str, str]]:
    """Return the keys and paths of a source's local files and folders that do not exist."""
    paths = {kind: str(path) for kind in ("images", *SOURCE_KINDS) if (path := getattr(source, kind)) is not None}
    return [
        (kind, path)
        for kind, path in paths.items()
        if (kind not in ("mmeb", "hub") or path.startswith(LOCAL_PREFIXES))
        and not os.path.exists(path)  # Path.exists raises for a name that is too long
        and not (kind in ("file", "webdataset") and ("://" in path or match_pattern(Path(path))))
    ]


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _find_recipe(name_or_path: str) -> Path:
    path = RECIPES / f"{name_or_path}.yaml" if name_or_path in recipe_names() else Path(name_or_path)
    if os.path.isfile(path):
        return path
    raise UsageError(
        f"No recipe {name_or_path!r}: neither a file nor a recipe of this package "
        f"{did_you_mean(name_or_path, recipe_names())}."
    )


def apply_override(recipe: type[Settings], values: dict[str, Any], override: str) -> None:
    """Change the values of settings by an override ``key.sub=value``.

    :raises UsageError: If the override is not of this form, or its value is not YAML.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"Override {override!r} is not of the form key.sub=value.")
    *parents, last = key.split(".")
    if _takes_text(recipe, [*parents, last]) and text not in YAML_NULLS and text[0] not in "\"'":
        text = yaml.safe_dump(text)
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UsageError(f"Override {override!r}: {parent} is a value and has no keys of its own.")
    try:
        values[last] = read_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"Override {override!r}: {text!r} is not a YAML value.") from error
    if parents and last in OTHER_LENGTH and values[last] is not None:
        for replaced in OTHER_LENGTH[last]:
            values.pop(replaced, None)


def _takes_text(recipe: type[Settings], location: list[str]) -> bool:
    """Return whether a key holds a text or a path, which YAML could read as a number, a date or a mapping."""
    field = _fields_at(recipe, location[:-1]).get(location[-1])
    if field is None:
        return False
    alternatives = get_args(field.annotation) or (field.annotation,)
    return any(alternative in (str, Path) or isinstance(alternative, str) for alternative in alternatives)


def _fields_at(recipe: type[Settings], location: list[str]) -> dict[str, FieldInfo]:
    """Return the fields of the settings at a location of a recipe, none if there are no settings."""
    fields, keys = recipe.model_fields, iter(location)
    for key in keys:
        types = _types_in(fields[key].annotation) if key in fields else []
        if any(get_origin(each) is dict for each in types):
            next(keys, None)  # the name of a subset
        settings = [each for each in types if get_origin(each) is None and isinstance(each, type)]
        fields = next((each.model_fields for each in settings if issubclass(each, Settings)), {})
    return fields


def _types_in(annotation: object) -> list[object]:
    """Return a type and the types of which it is a union or a mapping."""
    return [annotation, *(each for argument in get_args(annotation) for each in _types_in(argument))]


def describe_fault(recipe: type[Settings], fault: ErrorDetails) -> str:
    """Return what is wrong with a value of settings, and which key may have been meant."""
    location = [str(part) for part in fault["loc"] if part not in UNION_MEMBERS]
    name = ".".join(location)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {name!r} {_hint(recipe, location)}"
    if fault["type"] == "missing":
        return f"key {name!r} is missing"
    if fault["type"] == "value_error":
        return f"{name}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{name} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _hint(recipe: type[Settings], location: list[str]) -> str:
    """Return a hint about an unknown key: the settings of the recipe that have it, or the closest known key."""
    *parents, last = location
    belongs = [f"{key}.{last}" for key in recipe.model_fields if last in _fields_at(recipe, [key])]
    if belongs and not parents:
        return f"(did you mean {' or '.join(map(repr, belongs))}?)"
    return did_you_mean(last, list(_fields_at(recipe, parents)))
