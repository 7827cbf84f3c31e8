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
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation import embed as embed_module
from cocoa_embed.evaluation.embed import MAX_BATCH_ITEMS, embed_items, estimated_tokens


@pytest.fixture
def mixed(tmp_path: Path) -> list[Item]:
    found = []
    for number in range(40):
        path = tmp_path / f"{number}.png"
        mosaic(number).save(path)
        kinds = (Item("red " * (number % 7 + 1)), Item(None, (path,)), Item(f"blue {number}", (path,)))
        found.append(kinds[number % 3])
    return found


def test_each_item_gets_the_embedding_that_it_has_alone_in_batches_of_one_kind_within_the_limit(
    mixed: list[Item],
) -> None:
    class Watched(ScoredModel):
        def _encode(self, inputs: list[Any], prompt: str | None, task: str) -> np.ndarray:
            kinds.append({frozenset(item) for item in inputs})
            assert len(inputs) == 1 or sum(map(estimated_tokens, inputs)) <= 20
            return super()._encode(inputs, prompt, task)

    kinds: list[set[frozenset[str]]] = []
    found = embed_items(Encoder(Watched()), mixed, "document", batch_tokens=20)
    assert all(len(each) == 1 for each in kinds)
    assert 5 < len(kinds) < len(mixed), "there were several batches"
    alone = [ScoredModel().encode_document([item.load()], 1, False)[0] for item in mixed]
    np.testing.assert_allclose(found, alone, atol=1e-6)


def test_batches_of_short_texts_and_tokens_are_bounded() -> None:
    model = ScoredModel()
    embed_items(Encoder(model), [Item("a")] * (MAX_BATCH_ITEMS + 1), "document")
    assert model.batches == [MAX_BATCH_ITEMS, 1]
    assert estimated_tokens({"image": Image.new("RGB", (280, 56))}) == 20
    assert estimated_tokens({"image": Image.new("RGB", (1, 1)), "text": "é" * 3}) == 1 + 2


def test_only_a_few_images_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[int] = set()
    most = 0

    def load(*_: object, **__: object) -> Image.Image:
        nonlocal most
        image = colour_image("red", (28, 28))
        held.add(id(image))
        most = max(most, len(held))
        return image

    class Releasing(FakeModel):
        def encode_document(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
            held.difference_update(id(item["image"]) for item in inputs)
            return np.ones((len(inputs), self.dimension))

    monkeypatch.setattr(rows_module, "load_image", load)
    items = [Item(None, (Path(str(number)),)) for number in range(300)]
    embed_items(Encoder(Releasing()), items, "document", batch_tokens=4)
    assert 4 < most <= 4 + embed_module.IMAGES_AHEAD + 2


class Faulty(FakeModel):
    """A model that has too little memory for the word huge, and no finite embedding of the word red."""

    def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
        if "huge" in item["text"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._embed(item) * (np.nan if "red" in item["text"] else 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{IMAGE_TOKEN} blue", r"fake cannot embed the text '<\|image_pad\|> blue' \(.*image tokens do not"),
        ("huge", r"2 items at once, including the text 'green', .* memory .* smaller --batch-tokens"),
        ("red", "fake embeds the text 'red' as a vector that is not finite"),
    ],
)
def test_an_item_that_the_model_cannot_embed_is_named(text: str, message: str) -> None:
    with pytest.raises(CocoaError, match=message):
        embed_items(Encoder(Faulty(), "fake"), [Item("green"), Item(text)], "query")
