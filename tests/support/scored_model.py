"""A quick model that tells any two texts and any two pictures apart, and data to score it on: pairs, and MMEB-V1."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from fake_model import COLOURS, FakeModel
from PIL import Image

SIZE = 4
NOISE = 60.0
Values = dict[str, Any]
NAMES = list(COLOURS)
TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema({"qry_text": pa.string(), "qry_img_path": pa.string(), "tgt_text": TEXTS, "tgt_img_path": TEXTS})


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


# The layout of ``TIGER-Lab/MMEB-eval``, a subset for each of the four meta-tasks


def write_subset(data: Path, name: str, rows: list[Values], shards: int = 1) -> Path:
    """Write rows as a subset; return its folder."""
    folder = data / name
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]
        file = folder / f"test-{shard:05}-of-{shards:05}.parquet"
        parquet.write_table(pa.Table.from_pylist(part, schema=SCHEMA), file)
    return folder


def write_mosaics(images: Path, subset: str, count: int, seed: int) -> list[str]:
    """Write pictures of all colours in turn; return their paths below ``images``."""
    (images / subset).mkdir(parents=True, exist_ok=True)
    paths = [f"{subset}/{number:04}.png" for number in range(count)]
    for number, path in enumerate(paths):
        mosaic(seed * 1000 + number, NAMES[number % len(NAMES)]).save(images / path)
    return paths


def mmeb_row(text: str, image: str, targets: Sequence[str], target_images: Sequence[str] | None = None) -> Values:
    images = [""] * len(targets) if target_images is None else list(target_images)
    return {"qry_text": text, "qry_img_path": image, "tgt_text": list(targets), "tgt_img_path": images}


def classification(paths: list[str]) -> Iterator[Values]:
    labels = [f"{colour}, a kind of {colour}" for colour in NAMES]
    for number, path in enumerate(paths):
        right = labels[number % len(NAMES)]
        others = [label for label in labels if label != right]
        yield mmeb_row("<|image_1|>\nRepresent the given image for classification\n", path, [right, *others])


def question_answering(paths: list[str]) -> Iterator[Values]:
    used = paths[: max(1, len(paths) // 2)]
    for number in range(len(paths)):
        right = NAMES[number % len(used) % len(NAMES)]
        text = f"<|image_1|>\nRepresent the given image with the following question: what colour, {number}?\n"
        yield mmeb_row(text, used[number % len(used)], [right, *(f"wrong {number} {each}" for each in range(6))])


def retrieval(paths: list[str]) -> Iterator[Values]:
    generator = np.random.default_rng(4)
    for number, path in enumerate(paths):
        others = [other for other in generator.permutation(paths).tolist() if other != path][: len(paths) - 3]
        text = f"Find me an everyday image that matches the given caption: {NAMES[number % 4]} {number}\n"
        yield mmeb_row(text, "", ["<|image_1|>\nRepresent the given image.\n"] * (len(others) + 1), [path, *others])


def grounding(paths: list[str]) -> Iterator[Values]:
    select = "<|image_1|>\nSelect the portion of the image that follows the language expressions: "
    for number, path in enumerate(paths):
        targets = [f'{select}"the {NAMES[(number + each) % 4]} one"\n' for each in range(4)]
        images = [paths[(number + each // 2) % len(paths)] for each in range(4)]
        yield mmeb_row(f'{select}"{NAMES[number % 4]} thing {number}"\n', path, targets, images)


SUBSETS = {
    "ImageNet-1K": classification,
    "OK-VQA": question_answering,
    "MSCOCO_t2i": retrieval,
    "RefCOCO-Matching": grounding,
}
"""A subset of each meta-task."""


def subset_rows(images: Path, name: str, rows: int) -> list[Values]:
    """Write the images of a subset; return its rows."""
    return list(SUBSETS[name](write_mosaics(images, name, rows, list(SUBSETS).index(name))))


def write_benchmark(folder: Path, rows: int = 12) -> tuple[Path, Path]:
    """Write a subset of each meta-task; return the folders of data and of images."""
    data, images = folder / "MMEB-eval", folder / "eval_images"
    for name in SUBSETS:
        write_subset(data, name, subset_rows(images, name, rows))
    return data, images
