"""``--max-pixels``: images of another size than the model was trained on, known to the collection."""

from pathlib import Path

import pytest
from command_line import Command
from exported import write_checkpoint
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_backbones import TINY_MAX_LENGTH, tiny_clip_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cocoa_embed.encode.batches import token_counter
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import UsageError
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.serve.limits import Limits
from cocoa_embed.serve.run import open_app

SMALL = 28**2
"""One visual token."""


@pytest.fixture
def model(tiny_backbone_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, max_pixels=4 * SMALL)
    write_checkpoint(backbone, Path("model"))
    Path("photos").mkdir()
    Image.linear_gradient("L").convert("RGB").save("photos/a.png")
    Image.linear_gradient("L").rotate(90).convert("RGB").save("photos/b.png")
    return "model"


def test_the_limit_is_part_of_what_the_collection_was_made_with(command: Command, model: str) -> None:
    index = ("index", "photos", "--model", model, "--json")
    assert command(*index, "--max-pixels", SMALL).document()["indexed"] == 2
    assert command(*index, "--max-pixels", SMALL).document()["unchanged"] == 2
    search = ("search", "--image", "photos/b.png", "--model", model, "--limit", 1, "--json")
    (hit,) = command(*search, "--max-pixels", SMALL).document()["hits"]
    assert Path(hit["path"]).name == "b.png"
    for words in (index, search, (*search, "--max-pixels", 4 * SMALL)):
        refused = command(*words)
        assert refused.status == 1
        assert "or give the model that made it, with the same --max-pixels" in refused.err
    assert command("embed", "photos", "--model", model, "--out", "out", "--max-pixels", SMALL).status == 0
    assert command("load", "out").status == 0, "of the same limit"
    indexer, _ = open_app(model, "cpu", {"path": "cocoa-index"}, Limits(), None, SMALL)
    indexer.encoder.batches.close()  # type: ignore[attr-defined]
    indexer.close()


def test_a_limit_is_that_of_the_processor_and_the_models_own_changes_nothing(model: str) -> None:
    own, same, larger = (load_encoder(model, "cpu", max_pixels=pixels) for pixels in (None, 4 * SMALL, 16 * SMALL))
    assert own.fingerprint == same.fingerprint != larger.fingerprint
    assert [token_counter(each.model)(256, 256) for each in (own, larger)] == [4, 16]


@pytest.mark.parametrize("words", ["index photos", "embed photos --out out", "search red", "eval pairs photos"])
def test_a_limit_that_fits_no_sequence_is_wrong_usage(command: Command, model: str, words: str) -> None:
    rows = [f'{{"file_name": "{name}.png", "text": "{name}"}}\n' for name in "ab"]
    Path("photos/metadata.jsonl").write_text("".join(rows))
    if words.startswith("search"):
        assert command("index", "photos", "--model", model).status == 0
    found = command(*words.split(), "--model", model, "--max-pixels", 1000 * SMALL)
    assert found.status == 2
    assert "takes 1000 visual tokens, more than the 120 that" in found.err


def test_a_model_of_no_family_has_no_limit(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"red": 0}, unk_token="red"))
    texts = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=4)], device="cpu")
    for name, model in (("clip", tiny_clip_model(tmp_path / "weights")), ("texts", texts)):
        model.save(str(tmp_path / name))
        with pytest.raises(UsageError, match=f"not for .*{name}; leave max_pixels out"):
            load_encoder(tmp_path / name, "cpu", max_pixels=SMALL)
