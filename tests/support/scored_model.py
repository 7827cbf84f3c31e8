"""A multimodal model of arithmetic that tells any two texts and any two pictures apart, and is quick."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_model import COLOURS, FakeModel
from PIL import Image

SIZE = 4
NOISE = 60.0


class ScoredModel(FakeModel):
    """Embeds what ``FakeModel`` does, each word and each prompt leaving a trace; two seeds are two models."""

    def __init__(self, seed: int = 0, noise: float = NOISE, modalities: tuple[str, ...] = ("text", "image")) -> None:
        super().__init__(3 * SIZE * SIZE, modalities)
        self.seed, self.noise = seed, noise
        self.prompts = {"query": "find: ", "document": ""}
        self.calls = 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"seed": torch.tensor([self.seed, self.noise])}

    def encode_query(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
        self.calls += 1
        return super().encode_query([self._prompted(item) for item in inputs], batch_size, show_progress_bar)

    def encode_document(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
        self.calls += 1
        return super().encode_document(inputs, batch_size, show_progress_bar)

    def _prompted(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "text": self.prompts["query"] + item["text"]} if "text" in item else item

    def _embed(self, item: dict[str, Any]) -> np.ndarray:
        vector = np.zeros(self.dimension)
        if "image" in item:
            assert isinstance(item["image"], Image.Image)
            pixels = np.asarray(item["image"].resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
            vector += pixels.ravel() - 128
        for word in item.get("text", "").split():
            if word in COLOURS:
                vector += np.tile(COLOURS[word], SIZE * SIZE) - 128.0
            generator = np.random.default_rng([zlib.crc32(word.encode()), self.seed])
            vector += self.noise * generator.normal(size=self.dimension)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


def mosaic(seed: int, colour: str | None = None) -> Image.Image:
    """Return a picture of blocks that no other seed gives, of a colour if one is named."""
    blocks = np.random.default_rng(seed).integers(0, 256, size=(SIZE, SIZE, 3))
    if colour is not None:
        blocks = (blocks + 2 * np.array(COLOURS[colour])) // 3
    return Image.fromarray(blocks.astype(np.uint8)).resize((8 * SIZE, 8 * SIZE), Image.Resampling.NEAREST)


def write_captioned(folder: Path, captions: Sequence[Sequence[str]]) -> Path:
    """Write an image folder of mosaics, each with some captions; every fourth has the same colour."""
    folder.mkdir()
    colours = list(COLOURS)
    for number in range(len(captions)):
        mosaic(number, colours[number % 4]).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": text} for number, texts in enumerate(captions) for text in texts]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
