"""Imports between packages go one way, as the table in `docs/architecture.md` says."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE_TREES = {
    Path(): ROOT / "cocoa_embed",
    Path("train"): ROOT / "train",
    Path("integrations"): ROOT / "integrations",
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
    "sources": ("cpu_threads", "errors", "folders", "images", "data"),
    "report": ("errors",),
    "evaluation": (*CORE, "report.tables"),
    "captioning": CORE,
    "train.settings": ("errors", "data"),
    "train.recipe": ("errors", "images", "data", "train.settings", "train.stages"),
    "train.data": ("errors", "folders", "images", "data", "model", "train.settings"),
    "train.loop": (*CORE, "train.settings", "train.recipe", "train.data"),
    "train.stages": (*CORE, "evaluation.geometry", "train.settings", "train.data", "train.loop"),
    "train.plan": (*CORE, "train.settings", "train.recipe", "train.data", "train.loop", "train.stages"),
    "train": (*CORE, "evaluation.geometry", "train"),
    "integrations.qdrant": (*CORE, "sources", "report.html"),
    "integrations.llama_index": (*CORE, "sources", "integrations.qdrant"),
    "integrations.llama-index-embeddings-cocoa": ("integrations.llama_index",),
    "serve": (*CORE, "sources", "integrations.qdrant"),
    "integrations.ray": (*CORE, "sources", "integrations.qdrant"),
    "integrations": (),
    "demo": ("",),
    "cli": ("",),
}
"""What each package may import besides itself; the longest name that fits a module counts. "" is everything."""


def imports(source: str) -> Iterator[tuple[str, int]]:
    """Yield each module that a source text imports, deferred or not, and the line; ruff bans relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((name, node.lineno) for name in (node.module, *(f"{node.module}.{a.name}" for a in node.names)))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func).rpartition(".")[2] in IMPORTING_CALLS:
                yield str(node.args[0].value), node.lineno


def source_files() -> dict[str, Path]:
    """Return the path of every module of the wheel, by its name inside the package; linked folders once."""
    return {
        ".".join((package / path.relative_to(tree)).with_suffix("").parts).removesuffix("__init__").strip("."): path
        for package, tree in SOURCE_TREES.items()
        for path in sorted(tree.rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    }


def within(module: str, *packages: str) -> bool:
    return any(package in ("", module) or module.startswith(package + ".") for package in packages)


def package_of(module: str) -> str:
    return max((package for package in ALLOWED if within(module, package)), key=len)


def package_imports() -> Iterator[tuple[str, str, int]]:
    """Yield every import of one of the package's modules by another: both names, and the line."""
    modules = source_files()
    for name, path in modules.items():
        for imported, line in imports(path.read_text(encoding="utf-8")):
            if within(imported, "cocoa_embed") and (place := imported.partition(".")[2]) in modules:
                yield name, place, line


def test_every_form_of_import_is_seen() -> None:
    data = "cocoa_embed.train.data"
    for source in (f"import {data} as d", f"import_module('{data}')", f"def f():\n    from {data} import rows"):
        assert data in [module for module, _ in imports(source)]


def test_every_package_has_modules_and_a_rule() -> None:
    assert {package_of(name) for name in source_files()} == set(ALLOWED)


def test_packages_import_only_what_they_may() -> None:
    found = [
        f"{name}:{line} imports {imported}"
        for name, imported, line in package_imports()
        if package_of(imported) != package_of(name)
        and imported
        and not within(imported, *ALLOWED[package_of(name)])
        and not (name == "train.__main__" and within(imported, "cli"))
    ]
    assert not found, "\n".join(found)


def test_modules_import_each_other_in_no_circle() -> None:
    """Deferred imports count: a circle inside functions is a circle."""
    needs: dict[str, set[str]] = defaultdict(set)
    for name, imported, _ in package_imports():
        # A package's own face imports its modules, which import it by their names.
        if imported and not name.startswith(f"{imported}."):
            needs[name].add(imported)
    assert needs
    TopologicalSorter(needs).prepare()


def test_no_folder_has_more_than_a_dozen_modules() -> None:
    crowded = {
        str(folder.relative_to(ROOT)): len(modules)
        for tree in (*SOURCE_TREES.values(), ROOT / "tests", ROOT / "benchmarks")
        for folder in [tree, *(path for path in tree.rglob("*") if path.is_dir() and not path.is_symlink())]
        if len(modules := [path for path in folder.glob("*.py") if path.name != "__init__.py"]) > 14
    }
    assert not crowded
