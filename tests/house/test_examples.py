"""The examples run, and count every file whose content is found."""

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from exported import write_checkpoint
from fake_model import FakeModel, write_colours

from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import export_model

pytest.importorskip("llama_index.core")
pytest.importorskip("qdrant_client")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images, one of them under three names, and a file that is no image; the working directory is beside it."""
    folder = tmp_path / "photos"
    write_colours(folder, "red", "green", "blue")
    for copy in ("a.png", "z.png"):
        shutil.copy(folder / "red.png", folder / copy)
    (folder / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return folder


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_every_copy_of_an_image_counts_as_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("index_and_search").main(FakeModel(), str(folder), "red")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 new, 0 replaced, 2 updated, 0 unchanged, 1 failed"
    best = lines[lines.index("nearest to 'red':") + 1]
    assert best.endswith(f"{folder / 'a.png'}  (and 2 more with this content)")

    example("find_itself").main(FakeModel(), "photos")
    unchanged = capsys.readouterr().out.splitlines()[0]
    assert "5 of 5 files find themselves first" in unchanged

    for file in ("green.png", "blue.png", "broken.png"):
        (folder / file).unlink()
    example("find_itself").main(FakeModel(), str(folder))
    assert "3 of 3 files find themselves first" in capsys.readouterr().out, "an index of one image has no second hit"


def test_cocoa_retriever_and_llama_indexs_own_store_find_the_same_images(
    tiny_backbone: Backbone, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_index.vector_stores.qdrant")
    checkpoint = write_checkpoint(tiny_backbone, folder.parent / "checkpoint")
    model = export_model(checkpoint, folder.parent / "model")
    example("llama_index_retrieval").main(str(model), str(folder), "red")
    failure, *lines = capsys.readouterr().out.splitlines()
    assert failure.startswith(f"not indexed: {folder / 'broken.png'}: ")
    retriever, together, stock = lines[:4], lines[4:8], lines[8:]
    assert retriever[1:] == stock[1:]
    assert sorted(line.split()[1] for line in together[1:]) == sorted(line.split()[1] for line in retriever[1:])


@pytest.mark.slow
def test_the_training_example_leaves_a_model(
    scene_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [f"{stage}.steps=1" for stage in ("warmup", "bridge", "contrastive")]
    sizes = [f"{stage}.batch_size=4" for stage in ("warmup", "bridge", "contrastive")]
    example("train_and_export").main(str(scene_folder), "my-model", *steps, *sizes, "bridge.probe_rows=4")
    assert json.loads((folder.parent / "my-model" / "modules.json").read_text())
    printed = capsys.readouterr().out
    assert "contrastive: 1 steps" in printed
    assert "my-model embeds texts and images in 192 dimensions" in printed
