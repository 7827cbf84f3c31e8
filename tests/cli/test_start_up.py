"""What commands import: nothing heavy where no model runs, and no more than sentence-transformers where one does."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from command_line import Command, modules_imported_by, modules_of_command
from exported import write_checkpoint
from fake_model import write_colours
from fake_qdrant import fake_server
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.cli.__main__ import main
from cocoa_embed.model.backbone import load_backbone

HEAVY = {"torch", "transformers", "sentence_transformers", "datasets", "accelerate", "sklearn", "scipy", "pandas"}

OURS = {
    "cocoa_embed",
    "typer",
    "qdrant_client",
    "grpc",
    "portalocker",
    "pydantic",
    "rich",
    "google",
    "httpx",
    "httpcore",
}
"""What a search needs beside the model: the command line, and Qdrant's client with what it needs."""


@pytest.fixture(scope="module")
def model(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    return write_checkpoint(backbone, tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(params=["--path", "--edge", "--url"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    if request.param != "--url":
        yield [request.param, str(tmp_path / "index")]
        return
    with fake_server() as server:
        yield ["--url", server.url]


def test_a_run_with_nothing_new_loads_no_model_and_a_changed_model_is_still_found_out(
    command: Command, model: Path, storage: list[str], tmp_path: Path
) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    write_colours(tmp_path / "photos", "red", "green")
    words = ["index", "photos", "--model", "model", *storage, "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert command(*words).document()["indexed"] == 2
    done, modules = modules_of_command(words, tmp_path)
    assert (done.document()["unchanged"], done.document()["indexed"]) == (2, 0)
    assert not HEAVY & modules
    recipe = json.loads((own / "cocoa_training.json").read_text())
    recipe["recipe"]["prompts"]["document"] = "another prompt: "
    (own / "cocoa_training.json").write_text(json.dumps(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert "choose another collection, or give the model that made it" in command(*words).error()
    done, modules = modules_of_command(words, tmp_path)
    assert "choose another collection, or give the model that made it" in done.error()
    assert not HEAVY & modules, "the other model is remembered too"


@pytest.mark.slow
def test_a_search_by_text_imports_what_sentence_transformers_does_and_qdrants_client(
    command: Command, model: Path, tmp_path: Path
) -> None:
    write_colours(tmp_path / "photos", "red", "green")
    place = ["--path", str(tmp_path / "index")]
    assert command("index", tmp_path / "photos", "--model", model, *place).status == 0
    _, needed = modules_imported_by("import sentence_transformers")
    assert needed >= HEAVY & {"torch", "transformers"}
    done, modules = modules_of_command(["search", "red", "--model", str(model), *place], tmp_path)
    assert done.status == 0, done.err
    extra = {name.partition(".")[0] for name in modules - needed} - {name.partition(".")[0] for name in needed}
    heavy = {name for name in extra if not name.startswith("_") and name not in OURS}
    assert not heavy & (HEAVY | {"jinja2", "matplotlib", "pyarrow", "fsspec", "av", "qdrant_edge", "llama_index"}), (
        heavy
    )
    assert "qdrant_client" in extra
    done, modules = modules_of_command(
        ["search", "--like", str(tmp_path / "photos" / "red.png"), *place, "--diversity", "0.5"], tmp_path
    )
    assert (done.status, HEAVY & modules) == (0, set())


def test_ctrl_c_while_the_command_line_is_imported_is_that_of_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(ModuleType):
        @property
        def main(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "cocoa_embed.cli.main", Interrupted("main"))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code, capsys.readouterr().err) == (130, "cocoa-embed: interrupted\n")
