"""What a user installs: built from a copy of the sources, without the network."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

import cocoa_embed
from cocoa_embed.model.attention import TRANSFORMERS_FLOOR

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
SOURCE_TREES = {
    "cocoa_embed": ROOT / "cocoa_embed",
    "cocoa_embed/train": ROOT / "train",
    "cocoa_embed/integrations": ROOT / "integrations",
}
THIN = ROOT / "integrations" / "llama-index-embeddings-cocoa"
"""A distribution of its own: CocoaEmbedding under LlamaIndex's name."""
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE")
EXTRAS = {"train", "llama-index", "qdrant", "edge", "heic", "report", "eval", "tables", "pdf", "video", "ray", "serve"}
EXTRAS |= {"caption", "all", "dev"}


class Built(NamedTuple):
    """The names in the source archive and in the wheel made from it, and the wheel's metadata."""

    sdist: set[str]
    wheel: set[str]
    metadata: Message


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, source)
    for tree in SOURCE_TREES.values():
        shutil.copytree(tree, source / tree.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return build(source, out)


def build(source: Path, out: Path) -> Built:
    # The wheel is made from the source archive, so what it holds the archive holds too.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        wheel = set(archive.namelist())
        metadata_name = next(name for name in wheel if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode("utf-8"))
    return Built(sdist, wheel, metadata)


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def shipped_files() -> dict[str, Path]:
    """Return every file of the three source trees, by its place in the wheel."""
    return {
        f"{package}/{path.relative_to(tree).as_posix()}": path
        for package, tree in SOURCE_TREES.items()
        for path in tree.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not any(map(Path.is_symlink, path.parents))
        if THIN not in path.parents
    }


def test_wheel_and_source_archive_hold_every_module_and_data_file_and_nothing_else(built: Built) -> None:
    expected = set(shipped_files())
    assert {"cocoa_embed/py.typed", *(f"{package}/__init__.py" for package in SOURCE_TREES)} <= expected
    shipped = {name for name in built.wheel if ".dist-info/" not in name}
    assert shipped - expected == set()
    assert expected - shipped == set(), "list its package, or its pattern under package-data, in pyproject.toml"
    assert expected | set(PROJECT_FILES) <= built.sdist


@pytest.mark.slow
def test_llama_indexs_form_of_package_holds_one_module_of_a_namespace_and_is_imported_by_its_name(
    tmp_path: Path,
) -> None:
    pytest.importorskip("llama_index.core")
    shutil.copytree(THIN, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    built = build(tmp_path / "source", tmp_path / "dist")
    assert {name for name in built.wheel if ".dist-info/" not in name} == {"llama_index/embeddings/cocoa/__init__.py"}
    assert {"README.md", "LICENSE"} <= built.sdist
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in built.wheel)
    assert (THIN / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (built.metadata["Name"], built.metadata["Version"]) == (THIN.name, cocoa_embed.__version__)
    (needed,) = map(Requirement, built.metadata.get_all("Requires-Dist") or [])
    assert (needed.name, needed.extras) == ("cocoa-embed", {"llama-index", "qdrant"})
    assert needed.specifier.contains(cocoa_embed.__version__)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    statement = (
        "from llama_index.embeddings import cocoa; from cocoa_embed.integrations.llama_index import CocoaEmbedding;"
        " import llama_index.core; assert cocoa.CocoaEmbedding is CocoaEmbedding;"
        " assert cocoa.__all__ == ['CocoaEmbedding']"
    )
    path = os.pathsep.join(map(str, (tmp_path / "installed", ROOT)))
    command = [sys.executable, "-c", statement]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_git_ignores_nothing_that_is_shipped() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not in a git checkout")
    command = ["git", "check-ignore", "--no-index", *map(str, shipped_files().values())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, f"ignored, or git failed: {done.stdout}{done.stderr}"


def test_metadata_names_licence_version_and_extras_apart_from_the_base(built: Built, project: dict) -> None:
    assert built.metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in built.wheel)
    assert built.metadata["Version"] == project["version"] == cocoa_embed.__version__
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert set(built.metadata.get_all("Provides-Extra") or []) == EXTRAS
    base = {Requirement(line).name for line in project["dependencies"]}
    extras = {extra: lines for extra, lines in project["optional-dependencies"].items() if extra not in ("all", "dev")}
    assert base.isdisjoint(Requirement(line).name for lines in extras.values() for line in lines)


@pytest.fixture(scope="module")
def constraints() -> list[Requirement]:
    return list(map(Requirement, (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()))


def test_constraints_pin_every_direct_dependency_by_version_alone(
    project: dict, constraints: list[Requirement]
) -> None:
    direct = chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {Requirement(line).name for line in direct} - {"cocoa-embed"}
    assert {"torch", "setuptools"} <= names <= {requirement.name for requirement in constraints}
    for requirement in constraints:
        assert requirement.url is None
        assert [each.operator for each in requirement.specifier] == ["=="]


def test_the_floor_of_transformers_is_the_documented_one(project: dict, constraints: list[Requirement]) -> None:
    requirements = {(parsed := Requirement(line)).name: parsed.specifier for line in project["dependencies"]}
    assert str(requirements["transformers"]) == f">={TRANSFORMERS_FLOOR}"
    assert f"transformers {TRANSFORMERS_FLOOR} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    pins = {pin.version for each in constraints if each.name == "transformers" for pin in each.specifier}
    assert set(requirements["transformers"].filter(pins)) == pins, "what is pinned is older than what is needed"
