"""A multimodal model made of arithmetic: colours are its words, and it counts what it is asked."""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
LARGEST_ASPECT_RATIO = 200
IMAGE_TOKEN = "<|image_pad|>"


class FakeModel:
    """Stands for a SentenceTransformer: a 4 x 4 picture of the input is its embedding, of unit length.

    A text is the picture of the colours it names. Anything but a dictionary of text and image is refused, and as real
    processors do, an image much longer than wide and a text with the token that stands for an image.
    """

    def __init__(
        self, dimension: int = 48, modalities: Sequence[str] = ("text", "image", "message"), seed: int = 0
    ) -> None:
        self.dimension = dimension
        self.device = torch.device("cpu")
        self.prompts: dict[str, str] = {}
        self.default_prompt_name = None
        self.truncate_dim = None
        self._seed = seed
        self.modalities = modalities
        self.queries: list[Mapping[str, Any]] = []
        self.documents: list[Mapping[str, Any]] = []
        self.batches: list[int] = []
        self.threads: set[int] = set()
        self._active = 0

    def get_embedding_dimension(self) -> int:
        return self.dimension

    def eval(self) -> "FakeModel":
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights that differ from seed to seed, for those who tell models by them."""
        return {"weight": torch.full((self.dimension,), float(self._seed))}

    def __iter__(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def preprocess(self, inputs: list[Any], prompt: str | None, task: str) -> dict[str, torch.Tensor]:
        """Do in a worker what the model is spared; what a processor refuses is refused here."""
        assert task == "document"
        self.documents += inputs
        return {"vectors": torch.from_numpy(np.stack([self._embed(item) for item in inputs]))}

    def __call__(self, features: Mapping[str, torch.Tensor], task: str) -> dict[str, torch.Tensor]:
        self.batches.append(len(features["vectors"]))
        with self._alone():
            return {"sentence_embedding": features["vectors"]}

    def supports(self, modality: str | tuple[str, ...]) -> bool:
        parts = (modality,) if isinstance(modality, str) else modality
        return all(part in self.modalities for part in parts)

    def encode_query(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
        self.queries += inputs
        return self._encode(inputs)

    def encode_document(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
        self.documents += inputs
        self.batches.append(len(inputs))
        return self._encode(inputs)

    def _encode(self, inputs: list[Any]) -> np.ndarray:
        with self._alone():
            return np.stack([self._embed(item) for item in inputs])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._active += 1
        assert self._active == 1, "two threads are in the model at once"
        self.threads.add(threading.get_ident())
        try:
            yield
        finally:
            self._active -= 1

    def _embed(self, item: object) -> np.ndarray:
        assert isinstance(item, dict), f"expected a dictionary, got {type(item).__name__}"
        assert {"text", "image"} >= item.keys() != set(), f"unexpected keys {sorted(item)}"
        parts = []
        if "image" in item:
            image = item["image"]
            assert isinstance(image, Image.Image)
            assert image.mode == "RGB"
            if max(image.size) > LARGEST_ASPECT_RATIO * min(image.size):
                raise ValueError(f"absolute aspect ratio must be smaller than {LARGEST_ASPECT_RATIO}")
            parts.append(np.asarray(image.resize((4, 4), Image.Resampling.BOX), dtype=np.float64).ravel())
        if "text" in item:
            assert isinstance(item["text"], str)
            if IMAGE_TOKEN in item["text"]:
                raise ValueError("image features and image tokens do not match")
            colours = [COLOURS[word] for word in item["text"].split() if word in COLOURS] or [(90, 80, 70)]
            parts.append(np.tile(np.mean(colours, axis=0), 16))
        vector = np.resize(np.mean(parts, axis=0) + 1, self.dimension)
        return (vector / math.sqrt(vector @ vector)).astype(np.float32)


def colour_image(colour: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Return an image of one of the colours that the model knows."""
    return Image.new("RGB", size, COLOURS[colour])
