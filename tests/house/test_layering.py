"""Imports go one way: the demo on top, train and integrations side by side, the core at the bottom."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TRAIN, INTEGRATIONS, DEMO = "cocoa_embed.train", "cocoa_embed.integrations", "cocoa_embed.demo"
SOURCE_TREES = {"cocoa_embed": ROOT / "cocoa_embed", TRAIN: ROOT / "train", INTEGRATIONS: ROOT / "integrations"}
COMMAND_LINE = ("cocoa_embed.cli.main", "cocoa_embed.cli.index", "cocoa_embed.cli.summaries")
IMPORTING_CALLS = {"import_module", "require"}


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
    """Return the path of every module that the wheel installs, by its installed name."""
    return {
        module_name(path, tree, package): path
        for package, tree in SOURCE_TREES.items()
        for path in sorted(tree.rglob("*.py"))
    }


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def is_core(module: str) -> bool:
    return not within(module, TRAIN, INTEGRATIONS, DEMO, *COMMAND_LINE)


def violations(importer: Callable[[str], bool], forbidden: Callable[[Import], bool]) -> list[str]:
    """Return ``file:line imports module`` for each forbidden import; fail if no module is looked at."""
    modules = {name: path for name, path in source_files().items() if importer(name)}
    assert modules, "no source file was looked at"
    found: dict[str, None] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for each in imports(path.read_text(encoding="utf-8"), package):
            if forbidden(each):
                found[f"{path.relative_to(ROOT)}:{each.line} imports {each.module}"] = None
    return list(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import cocoa_embed.train.data.rows as d", "cocoa_embed.train.data.rows"),
        ("from cocoa_embed import train", "cocoa_embed.train"),
        ("from ..train import data", "cocoa_embed.train.data.rows"),
        ("from . import qdrant", "cocoa_embed.integrations.qdrant"),
        ("import_module('cocoa_embed.train')", "cocoa_embed.train"),
        ("importlib.import_module('cocoa_embed.train')", "cocoa_embed.train"),
        ("def f():\n    from cocoa_embed.train.data.rows import rows", "cocoa_embed.train.data.rows"),
        ("if TYPE_CHECKING:\n    from cocoa_embed.train.data.rows import rows", "cocoa_embed.train.data.rows"),
        ("if ready:\n    from cocoa_embed.train.data.rows import rows", "cocoa_embed.train.data.rows"),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: str) -> None:
    found = imports(source, package="cocoa_embed.integrations")
    assert expected in [each.module for each in found]
    assert all(each.deferred == source.startswith(("def", "if TYPE_CHECKING")) for each in found)


def test_the_three_source_trees_are_found() -> None:
    modules = source_files()
    assert {"cocoa_embed", "cocoa_embed.model.template", *COMMAND_LINE, TRAIN, INTEGRATIONS, DEMO} <= modules.keys()
    assert sum(is_core(name) for name in modules) >= 3


def test_core_imports_nothing_above_it() -> None:
    assert not violations(is_core, lambda each: within(each.module, TRAIN, INTEGRATIONS, DEMO))


def test_train_imports_neither_integrations_nor_demo() -> None:
    assert not violations(lambda name: within(name, TRAIN), lambda each: within(each.module, INTEGRATIONS, DEMO))


def test_integrations_import_neither_train_nor_demo() -> None:
    assert not violations(lambda name: within(name, INTEGRATIONS), lambda each: within(each.module, TRAIN, DEMO))


def test_importing_the_command_line_imports_no_upper_layer() -> None:
    assert not violations(
        lambda name: name in COMMAND_LINE,
        lambda each: within(each.module, TRAIN, INTEGRATIONS, DEMO) and not each.deferred,
    )


def test_no_module_uses_the_folder_names_as_packages() -> None:
    assert not violations(lambda name: True, lambda each: within(each.module, "train", "integrations"))


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
