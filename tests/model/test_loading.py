from pathlib import Path

import pytest

from cocoa_embed.errors import CocoaError
from cocoa_embed.model.loading import check_model_folder, is_hub_name, load_model


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_name_is_a_hub_name_only_if_it_cannot_be_a_folder() -> None:
    assert is_hub_name("sentence-transformers/clip-ViT-B-32")
    Path("models").mkdir()
    for name in ("cocoa-qwen2vl", "./a/b", "../a", "/abs/path", "~/m", "a/b/c", "a/", "/a", "models/mine", "a\\b/c"):
        assert not is_hub_name(name), name


def test_a_model_folder_needs_modules_and_weights() -> None:
    Path("good/0").mkdir(parents=True)
    Path("good/modules.json").write_text("[]")
    Path("good/0/model-00001-of-00002.safetensors").touch()
    check_model_folder(Path("good"))
    with pytest.raises(CocoaError, match="cannot be loaded as a SentenceTransformer"):
        load_model("good")
