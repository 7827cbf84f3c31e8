"""A remembered description is that of the loaded model, and is forgotten when a file or an option changes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exported import write_checkpoint
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.encode.description import Description, describe, remembered_in
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.model.fingerprint import model_fingerprint

KNOWN = Description("f" * 64, 8, takes_images=True, takes_both=True)
COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COCOA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("modules.json", "config_sentence_transformers.json", "model.safetensors"):
        (folder / name).write_text("0.125")
    return folder


def load() -> Description:
    pytest.fail("the model is loaded")


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_what_is_remembered_is_the_fingerprint_of_the_loaded_model(
    tiny_backbone_path: Path, tmp_path: Path, dtype: str | None
) -> None:
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    checkpoint = write_checkpoint(backbone, tmp_path / "run" / "contrastive")
    folder = checkpoint if dtype is None else export_model(checkpoint, tmp_path / "export")
    loaded = load_encoder(folder, "cpu", dtype=dtype)
    options = {"dtype": dtype, "revision": None, "trust_remote_code": False, "workers": 3}
    described = describe(folder, options, lambda: loaded.description)
    assert described == (model_fingerprint(loaded.model), loaded.dimension, True, True, 1)
    assert describe(folder, options, load) == described
    other = "float16" if dtype != "float16" else "bfloat16"
    assert remembered_in(folder, {"dtype": other}) != remembered_in(folder, options)


def rewrite(file: Path) -> None:
    before = file.stat()
    file.write_text("0.126")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: rewrite(folder / "model.safetensors"),
        lambda folder: (folder / "config_sentence_transformers.json").write_text("{}"),
        lambda folder: (folder / "chat_template.jinja").touch(),
        lambda folder: (folder / "model.safetensors").unlink(),
    ],
    ids=["weights of the same size and mtime", "prompts", "a new file", "a file less"],
)
def test_a_changed_folder_is_loaded_again(folder: Path, change: Callable[[Path], object]) -> None:
    describe(folder, {}, lambda: KNOWN)
    assert describe(folder, {}, load) == KNOWN
    change(folder)
    other = KNOWN._replace(dimension=9)
    assert describe(folder, {}, lambda: other) == other
    assert describe(folder, {}, load) == other


def test_a_copy_of_a_model_is_loaded_as_its_files_may_be_others(folder: Path, tmp_path: Path) -> None:
    describe(folder, {}, lambda: KNOWN)
    shutil.copytree(folder, tmp_path / "copy")
    assert remembered_in(tmp_path / "copy", {}) != remembered_in(folder, {})


def test_files_that_change_while_the_model_is_loaded_are_not_remembered(folder: Path) -> None:
    def load_slowly() -> Description:
        rewrite(folder / "model.safetensors")
        return KNOWN

    assert describe(folder, {}, load_slowly) == KNOWN
    file = remembered_in(folder, {})
    assert file is not None
    assert not file.exists()


@pytest.mark.parametrize("options", [{"trust_remote_code": True}, {"model_kwargs": {"a": 1}}, {"cache_folder": "x"}])
def test_what_depends_on_more_than_the_files_is_not_remembered(folder: Path, options: dict[str, Any]) -> None:
    assert remembered_in(folder, {}) is not None
    assert remembered_in(folder, options) is None
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir()
    for name, make in (("0_CLIPModel", lambda file: file.symlink_to(elsewhere)), ("adapter_config.json", Path.touch)):
        make(folder / name)
        assert remembered_in(folder, {}) is None
        (folder / name).unlink()
    assert remembered_in(folder, {}) is not None


def test_a_broken_or_unwritable_cache_costs_a_load_and_no_more(folder: Path, cache: Path) -> None:
    describe(folder, {}, lambda: KNOWN)
    (file,) = cache.glob("models/*.json")
    for content in ("", "[]", '{"dimension": 8}'):
        file.write_text(content)
        assert describe(folder, {}, lambda: KNOWN) == KNOWN
        assert describe(folder, {}, load) == KNOWN
    shutil.rmtree(cache)
    cache.touch()
    assert describe(folder, {}, lambda: KNOWN) == KNOWN
    assert cache.is_file()


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub" / "models--owner--name"
    snapshot = hub / "snapshots" / COMMIT
    for file in (snapshot / "modules.json", hub / "refs" / "main"):
        file.parent.mkdir(parents=True)
        file.write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    describe("owner/name", {"revision": COMMIT}, lambda: KNOWN)
    (snapshot / "model.safetensors").touch()  # downloaded when the model was loaded
    assert describe("owner/name", {"revision": COMMIT}, load) == KNOWN
    assert remembered_in("owner/name", {}) is not None
    assert remembered_in("owner/other", {}) is None
    assert remembered_in("no-model", {}) is None
