"""Every code block of README and docs runs, or is marked with what it needs."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import pytest
import yaml
from sybil import Document, Example
from sybil.example import NotEvaluated
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from tiny_backbones import tiny_clip_model

from cocoa_embed.cli.main import main
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.model.export import export_model
from cocoa_embed.train import Recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SHORT = ("steps=2", "batch_size=4")
"""Settings of each stage of a training run: what is shown is that the command runs, not what it learns."""
SHELL = {"bash", "sh"}
LANGUAGES = {"python", "json", "yaml", *SHELL}


def commands(script: str) -> list[list[str]]:
    """Return the commands of a shell script as words, without comments."""
    lines = script.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shorter(words: list[str]) -> list[str]:
    """Return the overrides that make a training run short."""
    stages = Recipe.load(words[2], [word for word in words[3:] if "=" in word and not word.startswith("-")]).stages
    probe = ["bridge.probe_rows=4"] if "bridge" in stages else []
    return [f"{stage}.{setting}" for stage in stages for setting in SHORT] + probe


def evaluate_shell(example: Example) -> None:
    for words in commands(example.parsed):
        if words[:4] == ["accelerate", "launch", "-m", "cocoa_embed.train"]:
            words = ["cocoa-embed", "train", *words[4:]]
        if words[:2] == ["cocoa-embed", "demo"]:
            continue  # ten minutes; tests/demo runs it at toy size
        if words[0] == "cocoa-embed":
            short = shorter(words) if words[1] == "train" else []
            with pytest.raises(SystemExit) as stopped:
                main([*words[1:], *short])
            assert stopped.value.code == 0, shlex.join(words)
        elif words[0] == "make":
            listed = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert listed.returncode == 0, listed.stderr
        elif words[:2] == ["pip", "install"]:
            assert set(re.findall(r"[\w-]+", words[-1].partition("[")[2])) <= extras(), shlex.join(words)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() if words[1] != "-m" else find_spec(words[2]), shlex.join(words)
        elif not (ROOT / words[0]).is_file():
            pytest.fail(f"nothing runs {shlex.join(words)!r}")


def extras() -> set[str]:
    listed = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)
    assert listed
    return set(re.findall(r"^([\w-]+) = ", listed.group(1), re.M))


def evaluate_json(example: Example) -> None:
    for line in example.parsed.splitlines():
        json.loads(line)


def evaluate_yaml(example: Example) -> None:
    """Parse a recipe; a part of one within a recipe that is otherwise complete."""
    whole = {"name": "docs", "backbone": "scene-captioner", "contrastive": {"steps": 1, "batch_size": 2}}
    Recipe.parse({**whole, **yaml.safe_load(example.parsed)})


PARSERS = (
    SkipParser(),
    PythonCodeBlockParser(),
    CodeBlockParser("json", evaluate_json),
    CodeBlockParser("yaml", evaluate_yaml),
    *(CodeBlockParser(language, evaluate_shell) for language in SHELL),
)


@pytest.fixture(scope="module")
def prepared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of, at toy size."""
    folder = tmp_path_factory.mktemp("docs")
    export_model(finished / "contrastive", folder / "cocoa-qwen2vl")
    for name in ("cocoa-demo/data/train", "cocoa-demo/data/held-out", "my-folder", "path/to/photos", "photos"):
        write_image_folder(folder / name, "train", 12, seed=len(name))
    shutil.copy(folder / "photos/00000.png", folder / "photo.jpg")
    (folder / "runs").mkdir()
    tiny_clip_model(folder / "clip").save(str(folder / "sentence-transformers/clip-ViT-B-32"))
    for name in ("my-model", "other-model"):
        shutil.copytree(folder / "cocoa-qwen2vl", folder / name)
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "workspace"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    environment = dict(os.environ)
    yield folder
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_runs_or_says_what_it_needs(page: Path, workspace: Path) -> None:
    document = Document.parse(str(page), *PARSERS)
    for example in document.examples():
        try:
            example.evaluate()
        except (NotEvaluated, SkipTest):
            continue


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_names_its_language_and_every_relative_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```(.*)$", text, re.M)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= LANGUAGES | {"text"}
    for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_the_readme_has_at_most_200_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
