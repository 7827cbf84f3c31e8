"""Imports between rooms go one way, as `docs/architecture.md` draws them."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_TREES = {
    "cocoa_embed": ROOT / "cocoa_embed",
    "cocoa_embed.train": ROOT / "train",
    "cocoa_embed.integrations": ROOT / "integrations",
}
IMPORTING_CALLS = {"import_module", "require"}

CORE = ("cpu_threads", "errors", "folders", "images", "data", "model", "encode")
ALLOWED: dict[str, tuple[str, ...]] = {
    "": (),
    "cpu_threads": (),
    "errors": (),
    "folders": ("errors",),
    "images": ("errors", "folders"),
    "data": ("errors", "folders", "images"),
    "model": ("errors", "folders"),
    "encode": ("cpu_threads", "errors", "folders", "images", "model"),
    "report": ("errors",),
    "evaluation": (*CORE, "report.tables"),
    "train.settings": ("errors", "data"),
    "train.recipe": ("errors", "data", "train.settings", "train.stages"),
    "train.data": ("errors", "folders", "images", "data", "model", "train.settings"),
    "train.loop": (*CORE, "train.settings", "train.recipe", "train.data"),
    "train.stages": (*CORE, "evaluation.geometry", "train.settings", "train.data", "train.loop"),
    "train.plan": (*CORE, "train.settings", "train.recipe", "train.data", "train.loop", "train.stages"),
    "train": (*CORE, "evaluation.geometry", "train"),
    "integrations.qdrant": CORE,
    "integrations.llama_index": (*CORE, "integrations.qdrant"),
    "integrations": (),
    "demo": ("",),
    "cli": ("",),
}
"""What each room may import besides itself; the longest name that fits a module counts. "" is everything."""


class Import(NamedTuple):
    """One imported module, where, and whether importing the file leaves it alone."""

    module: str
    line: int
    deferred: bool


def imported_modules(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that one statement or call imports; ``from a import b`` yields ``a`` and ``a.b``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*parents, *([node.module] if node.module else [])])
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args:
        called, first = ast.unparse(node.func).rpartition(".")[2], node.args[0]
        if called in IMPORTING_CALLS and isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


def defers(node: ast.AST) -> bool:
    """Say whether what is inside runs later or never: a function, or ``if TYPE_CHECKING``."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING" and not node.orelse
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def imports(source: str, package: str) -> list[Import]:
    """Return every import of a source text, the deferred ones too."""
    found: list[Import] = []

    def visit(node: ast.AST, deferred: bool) -> None:
        if isinstance(node, ast.stmt | ast.expr):
            found.extend(Import(name, node.lineno, deferred) for name in imported_modules(node, package))
        for child in ast.iter_child_nodes(node):
            visit(child, deferred or defers(node))

    visit(ast.parse(source), False)
    return found


def module_name(path: Path, tree: Path, package: str) -> str:
    parts = [package, *path.relative_to(tree).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> dict[str, Path]:
    """Return the path of every module of the wheel, by its installed name; linked folders once."""
    return {
        module_name(path, tree, package): path
        for package, tree in SOURCE_TREES.items()
        for path in sorted(tree.rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    }


def within(module: str, *packages: str) -> bool:
    return any(package in ("", module) or module.startswith(package + ".") for package in packages)


def place(module: str) -> str:
    """Return a module's name inside the package: ``train.data.rows``."""
    return module.partition(".")[2]


def room_of(module: str) -> str:
    return max((room for room in ALLOWED if within(place(module), room)), key=len)


def package_imports() -> Iterator[tuple[str, Import]]:
    """Yield every import of one of the package's modules by another: its name, and the imported module."""
    modules = source_files()
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for each in imports(path.read_text(encoding="utf-8"), package):
            if each.module in modules:
                yield name, each


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import cocoa_embed.train.data as d", "cocoa_embed.train.data"),
        ("from cocoa_embed import train", "cocoa_embed.train"),
        ("from ..train import data", "cocoa_embed.train.data"),
        ("from . import qdrant", "cocoa_embed.integrations.qdrant"),
        ("import_module('cocoa_embed.train')", "cocoa_embed.train"),
        ("importlib.import_module('cocoa_embed.train')", "cocoa_embed.train"),
        ("def f():\n    from cocoa_embed.train.data import rows", "cocoa_embed.train.data"),
        ("if TYPE_CHECKING:\n    from cocoa_embed.train.data import rows", "cocoa_embed.train.data"),
        ("if ready:\n    from cocoa_embed.train.data import rows", "cocoa_embed.train.data"),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: str) -> None:
    found = imports(source, package="cocoa_embed.integrations")
    assert expected in [each.module for each in found]
    assert all(each.deferred == source.startswith(("def", "if TYPE_CHECKING")) for each in found)


def test_every_room_has_modules_and_a_rule() -> None:
    assert {room_of(name) for name in source_files()} == set(ALLOWED)


def test_rooms_import_only_what_they_may() -> None:
    found = [
        f"{place(name)}:{each.line} imports {place(each.module)}"
        for name, each in package_imports()
        if room_of(each.module) != room_of(name)
        and place(each.module)
        and not within(place(each.module), *ALLOWED[room_of(name)])
        and not (place(name) == "train.__main__" and within(place(each.module), "cli"))
    ]
    assert not found, "\n".join(found)


def test_modules_import_each_other_in_no_circle() -> None:
    """Deferred imports count: a circle inside functions is a circle."""
    needs: dict[str, set[str]] = {}
    for name, each in package_imports():
        # A package's own face imports its modules, which import it by their names.
        if not name.startswith(each.module + "."):
            needs.setdefault(name, set()).add(each.module)
    assert needs

    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in finished:
            for other in sorted(needs.get(name, ())):
                visit(other, [*path, name])
            finished.add(name)

    for name in sorted(needs):
        visit(name, [])


def test_importing_the_command_line_imports_no_heavy_room() -> None:
    heavy = ("train", "integrations", "demo", "evaluation", "encode", "model")
    assert not [
        f"{place(name)}:{each.line} imports {place(each.module)}"
        for name, each in package_imports()
        if within(place(name), "cli") and within(place(each.module), *heavy) and not each.deferred
    ]


def test_no_folder_has_more_than_a_dozen_modules() -> None:
    crowded = {
        str(folder.relative_to(ROOT)): len(modules)
        for tree in (*SOURCE_TREES.values(), ROOT / "tests", ROOT / "benchmarks")
        for folder in [tree, *(path for path in tree.rglob("*") if path.is_dir() and not path.is_symlink())]
        if len(modules := [path for path in folder.glob("*.py") if path.name != "__init__.py"]) > 14
    }
    assert not crowded


def test_no_module_uses_the_folder_names_as_packages() -> None:
    modules = source_files()
    assert not [
        f"{name}:{each.line} imports {each.module}"
        for name, path in modules.items()
        for each in imports(path.read_text(encoding="utf-8"), name.rpartition(".")[0])
        if within(each.module, "train", "integrations")
    ]


def modules_loaded_by(statement: str) -> set[str]:
    """Return the names in ``sys.modules`` of a fresh interpreter after ``statement``."""
    report = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("module", ["cocoa_embed", "cocoa_embed.cli.main"])
def test_import_loads_no_heavy_library(module: str) -> None:
    loaded = modules_loaded_by(f"import {module}")
    assert module in loaded
    heavy = {"torch", "transformers", "sentence_transformers", "datasets", "qdrant_client", "llama_index", "matplotlib"}
    assert not heavy & loaded
