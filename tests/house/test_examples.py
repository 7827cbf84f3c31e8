"""The examples run, and count every file whose content is found; notebooks hold no outputs."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from exported import write_checkpoint
from fake_model import FakeModel, write_colours
from PIL import Image

from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import export_model

pytest.importorskip("llama_index.core")
pytest.importorskip("qdrant_client")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images, one of them under three names, and a file that is no image; the working directory is beside it."""
    folder = tmp_path / "photos"
    write_colours(folder, "red", "green", "blue")
    for copy in ("a.png", "z.png"):
        shutil.copy(folder / "red.png", folder / copy)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "all of it is red"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return folder


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def cells(notebook: str) -> list[dict[str, Any]]:
    document: dict[str, Any] = json.loads((EXAMPLES / f"{notebook}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in document["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def run_cells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Run the cells of a notebook in this process, where the model made of arithmetic stands for the demo's.

    Returns the variables; ``shown`` are the pictures.
    """
    model = Path("cocoa-qwen2vl")
    model.mkdir()
    for name in ("modules.json", "model.safetensors"):
        (model / name).touch()
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda *_, **__: FakeModel())
    Path("cocoa-demo/data").mkdir(parents=True)
    folder.rename("cocoa-demo/data/held-out")

    def run(notebook: str) -> dict[str, Any]:
        shown: list[Image.Image] = []
        names: dict[str, Any] = {"__name__": "__main__", "display": shown.append, "shown": shown}
        for cell in cells(notebook):
            exec(compile("".join(cell["source"]), f"{notebook} {cell['id']}", "exec", dont_inherit=True), names)
        return names

    return run


@pytest.mark.parametrize("notebook", [each.stem for each in NOTEBOOKS])
def test_notebooks_are_committed_without_outputs_and_are_no_second_form_of_a_script(notebook: str) -> None:
    assert cells(notebook)
    assert not [cell["id"] for cell in cells(notebook) if cell["outputs"] or cell["execution_count"]]
    assert not (EXAMPLES / f"{notebook}.py").exists()


def test_the_search_notebook_shows_what_is_near_to_a_text_an_image_and_both(
    run_cells: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_cells("index_and_search")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 new, 0 replaced, 2 updated, 0 unchanged"
    assert "broken.png: is not an image" in lines[1]
    assert lines[2].startswith("1.000  ")
    assert lines[2].endswith("held-out/a.png  (and 2 more with this content)  all of it is red")
    assert len(names["shown"]) == len(lines) - 2 == 3 + 3 + 3 + 2
    assert names["shown"][0].getpixel((0, 0)) == (255, 0, 0)
    assert names["example"] in lines[5], "an image finds itself"


def test_the_rag_notebook_shows_the_chat_model_photos_and_pages_and_what_it_cites(
    run_cells: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_cells("multimodal_rag")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 new, 0 unchanged, 1 failed"
    assert lines[1].startswith("I was shown 4 images (")
    sources = [found.node for found in names["response"].source_nodes]
    assert sources[0].text == "all of it is red"
    assert lines[2:6] == [
        f"[{number}]{'' if number == 1 else ' (not cited)'} {source.image_path}  {source.text}"
        for number, source in enumerate(sources, 1)
    ]
    assert lines[6].startswith("I was shown 2 images (1086 x 1536, 1086 x 1536 pixels)")
    assert [line.split("/")[-1] for line in lines[7:]] == ["report.pdf#page=2  ", "report.pdf#page=1  "]
    photo, page = names["shown"]
    assert (photo.getpixel((0, 0)), page.getpixel((0, 0))) == ((255, 0, 0), (255, 255, 255))
    read = names["llm"].read
    assert sources[0].text in read
    assert "report.pdf#page=2" in read


@pytest.mark.slow
@pytest.mark.parametrize("notebook", [each.stem for each in NOTEBOOKS])
def test_notebooks_run_from_end_to_end_in_a_kernel(
    notebook: str, scene_folder: Path, tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    export_model(write_checkpoint(tiny_backbone, tmp_path / "checkpoint"), tmp_path / "cocoa-qwen2vl")
    shutil.copytree(scene_folder, tmp_path / "cocoa-demo/data/held-out")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    document = nbformat.read(EXAMPLES / f"{notebook}.ipynb", as_version=4)
    nbformat.validate(document)
    nbclient.NotebookClient(document, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if "image/png" in output.get("data", {})]


def test_every_copy_of_an_image_counts_as_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with QdrantIndexer(FakeModel(), path="cocoa-index") as indexer:
        indexer.index(folder, progress=False)
    example("find_itself").main(FakeModel(), "photos")
    unchanged = capsys.readouterr().out.splitlines()[0]
    assert "5 of 5 files find themselves first" in unchanged

    for file in ("green.png", "blue.png", "broken.png"):
        (folder / file).unlink()
    with QdrantIndexer(FakeModel(), path="cocoa-index") as indexer:
        indexer.index(folder, progress=False, prune=True)
    example("find_itself").main(FakeModel(), str(folder))
    assert "3 of 3 files find themselves first" in capsys.readouterr().out, "an index of one image has no second hit"


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
