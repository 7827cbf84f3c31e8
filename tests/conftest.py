"""A random tiny backbone and a few drawn scenes, for every test that needs a model or data."""

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import Command, Result
from hypothesis import settings
from tiny_backbones import SCENES, STAGE, TINY_MAX_LENGTH, LoadTiny, MakeRecipe, write_tiny_backbone

from cocoa_embed.cli import main as cli
from cocoa_embed.data.rows import Row
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.data.caption_rows import read_image_folder

# A shared machine may stall any example; what a test shows does not depend on its time.
settings.register_profile("cocoa-embed", deadline=None)
settings.load_profile("cocoa-embed")


def pytest_configure() -> None:
    """Listen to Ctrl-C, which a shell that starts the tests in the background ignores, and compute with one thread.

    So small a model is slower with more threads, and one process would add up in another order than two.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collections: a training run makes several, of a second each otherwise."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let Python free everything at its end."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the cache of rows, and the copies that ``datasets`` makes of Parquet files, with the tests' own files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COCOA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``cocoa-embed`` with words and paths."""

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(map(str, arguments)))
        printed = capsys.readouterr()
        return Result(int(stopped.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> str:
    """The family of the tiny backbone; ``tiny_backbones.every_family`` asks for the others."""
    return getattr(request, "param", "qwen2_vl")


@pytest.fixture(scope="session")
def tiny_backbone_path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random tiny backbone, causal as Qwen's are, with its processor."""
    folder = tmp_path_factory.mktemp(f"tiny-{family}")
    write_tiny_backbone(family, folder)
    return folder


@pytest.fixture
def load_tiny(tiny_backbone_path: Path) -> LoadTiny:
    """Load the tiny backbone with an attention implementation of the test's choice."""

    def load(attn_implementation: str) -> Backbone:
        backbone = load_backbone(
            str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, attn_implementation=attn_implementation
        )
        backbone.model.eval()
        return backbone

    return load


@pytest.fixture
def tiny_backbone(tiny_backbone_path: Path) -> Backbone:
    """The tiny backbone, loaded again and bidirectional: a test may change it."""
    return load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 24 drawn training scenes."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_image_folder(folder, "train", SCENES, seed=0)
    return folder


@pytest.fixture(scope="session")
def scene_rows(scene_folder: Path) -> list[Row]:
    """The scenes as image-caption rows, one for each image."""
    return read_image_folder(scene_folder)


@pytest.fixture(scope="session")
def tiny_recipe(tiny_backbone_path: Path, scene_folder: Path) -> MakeRecipe:
    """Make a recipe with the tiny backbone and the drawn scenes; keywords change it."""

    def make(**values: object) -> Recipe:
        given = {"backbone": str(tiny_backbone_path), "data": {"folder": str(scene_folder)}, **values}
        return Recipe.parse({"name": "tiny-test", "max_length": TINY_MAX_LENGTH, **given})

    return make


@pytest.fixture(scope="session")
def small_recipe(tiny_recipe: MakeRecipe, scene_folder: Path) -> Recipe:
    """All three stages, two steps each."""
    contrastive = {"steps": 2, "batch_size": 4, "warmup_steps": 0, "logging_steps": 1}
    return tiny_recipe(
        name="small",
        data={"folder": str(scene_folder), "captions": "captions"},
        prompts={"query": "find: "},
        warmup=STAGE,
        bridge={**STAGE, "probe_rows": 4, "probe_steps": 1, "data": {"paraphrases": 1}},
        contrastive={**contrastive, "data": {"captions": "text", "limit": 9}},
    )


@pytest.fixture(scope="session")
def finished(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``small_recipe``."""
    out = tmp_path_factory.mktemp("runs") / "small"
    run(small_recipe, out)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, for a test that changes it."""
    return Path(shutil.copytree(finished, tmp_path / "small"))
