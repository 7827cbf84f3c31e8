from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_model import IMAGE_TOKEN, FakeModel, colour_image
from PIL import Image
from scored_model import ScoredModel, mosaic

from cocoa_embed.data import rows as rows_module
from cocoa_embed.data.rows import Item
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.evaluation import embed as embed_module
from cocoa_embed.evaluation.embed import MAX_BATCH_ITEMS, Role, embed_items, estimated_tokens


@pytest.fixture
def mixed(tmp_path: Path) -> list[Item]:
    found = []
    for number in range(40):
        path = tmp_path / f"{number}.png"
        mosaic(number).save(path)
        kinds = (Item("red " * (number % 7 + 1)), Item(None, (path,)), Item(f"blue {number}", (path,)))
        found.append(kinds[number % 3])
    return found


def test_each_item_gets_the_embedding_that_it_has_alone(mixed: list[Item]) -> None:
    model = ScoredModel()
    found = embed_items(Encoder(model), mixed, "document", batch_tokens=20)
    alone = [model.encode_document([item.load()], 1, False)[0] for item in mixed]
    assert len(model.batches) > len(mixed) + 5, "there were several batches"
    np.testing.assert_allclose(found.vectors, alone, atol=1e-6)
    assert found.broken == set()


def test_batches_hold_one_kind_and_no_more_than_the_limit(mixed: list[Item]) -> None:
    class Watched(ScoredModel):
        def encode_query(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
            assert batch_size == len(inputs)
            assert len({frozenset(item) for item in inputs}) == 1
            assert len(inputs) == 1 or sum(map(estimated_tokens, inputs)) <= 20
            return super().encode_query(inputs, batch_size, show_progress_bar)

    model = Watched()
    embed_items(Encoder(model), mixed, "query", batch_tokens=20)
    assert 5 < model.calls < len(mixed)


def test_batches_of_short_texts_and_tokens_are_bounded() -> None:
    model = ScoredModel()
    embed_items(Encoder(model), [Item("a")] * (MAX_BATCH_ITEMS + 1), "document")
    assert model.batches == [MAX_BATCH_ITEMS, 1]
    assert estimated_tokens({"image": Image.new("RGB", (280, 56))}) == 20
    assert estimated_tokens({"image": Image.new("RGB", (1, 1)), "text": "é" * 3}) == 1 + 2


def test_only_a_few_images_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[int] = set()
    most = 0

    def load(source: object) -> Image.Image:
        nonlocal most
        image = colour_image("red", (28, 28))
        held.add(id(image))
        most = max(most, len(held))
        return image

    class Releasing(FakeModel):
        def encode_document(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
            vectors = super().encode_document(inputs, batch_size, show_progress_bar)
            held.difference_update(id(item["image"]) for item in inputs)
            self.documents.clear()
            return vectors

    monkeypatch.setattr(rows_module, "load_image", load)
    embed_items(
        Encoder(Releasing()), [Item(None, (Path(str(number)),)) for number in range(300)], "document", batch_tokens=4
    )
    assert 4 < most <= 4 + embed_module.IMAGES_AHEAD + 2


def test_a_broken_image_is_an_error_or_skipped(tmp_path: Path) -> None:
    colour_image("red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    items = [Item(None, (tmp_path / name,)) for name in ("red.png", "broken.png", "gone.png")]
    with pytest.raises(ImageError, match=r"broken\.png: is not an image"):
        embed_items(Encoder(FakeModel()), items, "document")
    found = embed_items(Encoder(FakeModel()), items, "document", skip_broken=True)
    assert found.broken == {1, 2}
    assert found.vectors[0].any()
    assert not found.vectors[1:].any()


@pytest.mark.parametrize("role", ["query", "document"])
def test_an_item_that_the_model_refuses_is_named(role: Role) -> None:
    items = [Item("red"), Item(f"{IMAGE_TOKEN} blue"), Item("green")]
    with pytest.raises(CocoaError, match=r"fake cannot embed the text '<\|image_pad\|> blue' \(.*image tokens do not"):
        embed_items(Encoder(FakeModel(), "fake"), items, role)


def test_out_of_memory_says_what_to_lower() -> None:
    class Small(FakeModel):
        def _encode(self, inputs: list[Any], prompt: str | None, task: str) -> np.ndarray:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(CocoaError, match=r"2 items at once, the text 'a' .* memory .* smaller --batch-tokens"):
        embed_items(Encoder(Small()), [Item("a"), Item("b")], "query")


def test_an_embedding_that_is_not_finite_names_its_item() -> None:
    class Diverged(FakeModel):
        def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
            return super()._embed(item) * (np.nan if "red" in item["text"] else 1)

    with pytest.raises(CocoaError, match="fake embeds the text 'red' as a vector that is not finite"):
        embed_items(Encoder(Diverged(), "fake"), [Item("blue"), Item("red")], "query")
