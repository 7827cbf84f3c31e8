"""A multimodal model made of arithmetic: colours are its words, and it counts what it is asked."""

import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.model.export import EosVectors

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
LARGEST_ASPECT_RATIO = 200
IMAGE_TOKEN = "<|image_pad|>"


class FakeModel:
    """Stands for a SentenceTransformer: a 4 x 4 picture of the input is its embedding, of unit length.

    A text is the picture of the colours it names. Anything but a dictionary of text and image is refused, and as real
    processors do, an image much longer than wide and a text with the token that stands for an image. ``encode_query``
    and ``encode_document`` preprocess a batch and call the model, as those of SentenceTransformer do; others may do
    that themselves. A prompt changes no embedding, but is noted.
    """

    default_prompt_name = None
    truncate_dim: int | None = None
    device = torch.device("cpu")
    processor = None
    tokenizer = None

    def __init__(
        self,
        dimension: int = 48,
        modalities: Sequence[str] = ("text", "image", "message"),
        prompts: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.dimension = dimension
        self.seed = seed
        self.modalities = modalities
        self.prompts = dict(prompts or {})
        self.queries: list[Mapping[str, Any]] = []
        self.documents: list[Mapping[str, Any]] = []
        self.document_prompts: set[str | None] = set()
        self.batches: list[int] = []
        self.threads: set[int] = set()
        self._active = 0

    def get_embedding_dimension(self) -> int:
        return self.dimension

    def supports(self, modality: str | tuple[str, ...]) -> bool:
        parts = (modality,) if isinstance(modality, str) else modality
        return all(part in self.modalities for part in parts)

    def encode_query(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
        return self._encode(inputs, self.prompts.get("query"), "query")

    def encode_document(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
        return self._encode(inputs, self.prompts.get("document"), "document")

    def eval(self) -> "FakeModel":
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights that differ from seed to seed, for those who tell models by them."""
        return {"weight": torch.full((self.dimension,), float(self.seed))}

    def __iter__(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def preprocess(self, inputs: list[Any], prompt: str | None = None, task: str | None = None) -> dict[str, Any]:
        """Return a batch; as with real ones, several threads may do so at once, and the batch is its own."""
        for item in inputs:
            self._check(item)
        return {"items": list(inputs), "numbers": torch.arange(len(inputs)), "prompt": prompt}

    def __call__(self, features: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
        """Embed a batch that was preprocessed."""
        self._active += 1
        assert self._active == 1, "two threads are in the model at once"
        self.threads.add(threading.get_ident())
        try:
            items = features["items"]
            (self.queries if task == "query" else self.documents).extend(items)
            if task != "query":
                self.batches.append(len(items))
                self.document_prompts.add(features["prompt"])
            embeddings = np.stack([self._embed(item) for item in items])
        finally:
            self._active -= 1
        return {**features, "sentence_embedding": torch.from_numpy(embeddings)}

    def _encode(self, inputs: list[Any], prompt: str | None, task: str) -> np.ndarray:
        embeddings = self(self.preprocess(inputs, prompt=prompt, task=task), task=task)["sentence_embedding"]
        return embeddings[..., : self.truncate_dim].numpy()

    def _check(self, item: object) -> None:
        assert isinstance(item, dict)
        assert {"text", "image"} >= item.keys() != set()
        if "image" in item:
            assert item["image"].mode == "RGB"
            if max(item["image"].size) > LARGEST_ASPECT_RATIO * min(item["image"].size):
                raise ValueError(f"absolute aspect ratio must be smaller than {LARGEST_ASPECT_RATIO}")
        if IMAGE_TOKEN in item.get("text", ""):
            raise ValueError("image features and image tokens do not match")

    def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
        parts = []
        if "image" in item:
            small = item["image"].resize((4, 4), Image.Resampling.BOX)
            parts.append(np.asarray(small, dtype=np.float64).ravel())
        if "text" in item:
            colours = [COLOURS[word] for word in item["text"].split() if word in COLOURS] or [(90, 80, 70)]
            parts.append(np.tile(np.mean(colours, axis=0), 16))
        vector = np.resize(np.mean(parts, axis=0) + 1, self.dimension)
        return (vector / math.sqrt(vector @ vector)).astype(np.float32)


def colour_image(colour: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Return an image of one of the colours that the model knows."""
    return Image.new("RGB", size, COLOURS[colour])


def write_colours(folder: Path, *colours: str) -> list[str]:
    """Write ``red.png`` and so on, and return their paths; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{colour}.png" for colour in colours]
    for colour, file in zip(colours, files, strict=True):
        colour_image(colour).save(file)
    return [str(file) for file in files]


@contextmanager
def asking(encoder: Encoder, item: Mapping[str, Any]) -> Iterator[list[np.ndarray]]:
    """Embed a query again and again in another thread, which gets many turns; yield the list of its embeddings."""
    answers: list[np.ndarray] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(encoder.embed_queries([item]))

    interval, thread = sys.getswitchinterval(), threading.Thread(target=ask)
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        yield answers
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()


class SeveralVectors(FakeModel):
    """A ``FakeModel`` of several vectors: the first is its embedding, each other one in an order of its own."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.count = count

    def __iter__(self) -> Iterator[torch.nn.Module]:
        return iter((EosVectors(self.dimension, self.count),))

    def _embed(self, item: Mapping[str, Any]) -> np.ndarray:
        vector = super()._embed(item)
        orders = [np.random.default_rng(number).permutation(len(vector)) for number in range(1, self.count)]
        return np.concatenate([vector, *(vector[order] for order in orders)])
