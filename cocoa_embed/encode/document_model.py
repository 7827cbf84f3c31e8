"""What ``SentenceTransformer.encode_document`` does to a batch of images, cut into steps that may overlap.

Prepare: images become tensors on the CPU, in any thread. Launch: the model runs; on CUDA this returns early. Fetch: the
embeddings are awaited. ``ProcessorLock`` says which uses of a model's processor may run at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Features: TypeAlias = Mapping[str, Any]

DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""The names under which ``encode_document`` looks for a prompt, in this order."""


def document_prompt(model: SentenceTransformer) -> str | None:
    """Return the prompt that ``encode_document`` puts before what is stored, None if there is none."""
    for name in DOCUMENT_PROMPTS:
        if name in model.prompts:
            return model.prompts[name]
    return None if model.default_prompt_name is None else model.prompts.get(model.default_prompt_name)


@dataclass(frozen=True)
class Launched:
    """Embeddings that may still be on their way from the device."""

    embeddings: torch.Tensor
    arrived: torch.cuda.Event | None

    def fetch(self) -> np.ndarray:
        """Wait for the embeddings.

        :return: Array of shape ``(images, dimension)``, float32.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.embeddings.numpy()


class DocumentModel:
    """A model that embeds images as documents, batch by batch."""

    def __init__(self, model: SentenceTransformer) -> None:
        """Put the model into evaluation mode, as ``encode`` does."""
        self._model = model.eval()
        self._prompt = document_prompt(model)
        self.is_on_cuda = model.device.type == "cuda"
        self.is_on_cpu = model.device.type == "cpu"

    def prepare(self, images: Sequence[Image.Image]) -> Features:
        """Preprocess a batch, for CUDA into memory that can be copied while the model runs.

        :raises ValueError: If the processor refuses an image; other errors where it does so without meaning to.
        """
        features = self._model.preprocess([{"image": image} for image in images], prompt=self._prompt, task="document")
        if not self.is_on_cuda:
            return features
        return {name: value.pin_memory() if is_tensor(value) else value for name, value in features.items()}

    @torch.inference_mode()
    def launch(self, features: Features) -> Launched:
        """Run the model on a batch, without waiting for its results where the device allows.

        :raises torch.OutOfMemoryError: If the batch is too large for the device.
        """
        device = self._model.device
        inputs = {
            name: value.to(device, non_blocking=True) if is_tensor(value) else value for name, value in features.items()
        }
        embeddings = self._model(inputs, task="document")["sentence_embedding"]
        embeddings = embeddings[..., : self._model.truncate_dim].float()
        if embeddings.device.type != "cuda":
            return Launched(embeddings.cpu(), None)
        arriving = embeddings.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(embeddings.device))
        return Launched(arriving, arrived)


def is_tensor(value: object) -> bool:
    """Tell a tensor from what else a batch may hold, such as the name of its modality."""
    return isinstance(value, torch.Tensor)


class ProcessorLock:
    """Lets batches of documents be prepared at once, and anything else use the processor only by itself.

    A fast tokenizer keeps truncation and padding as its own state, which every call sets to what it needs. A query that
    needs other settings would change them while a batch of documents is under way: the batch fails or, worse, is cut.
    Documents all need the same, so they may run at once, when the first after such a query has set them.
    """

    def __init__(self) -> None:
        # Who comes next holds the queue while it waits, so that neither kind overtakes the other for ever.
        self._queue = threading.Lock()
        self._changed = threading.Condition()
        self._users = 0
        self._is_set_for_documents = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody uses the processor, and let nobody begin."""
        with self._queue, self._changed:
            self._changed.wait_for(lambda: self._users == 0)
            self._users = 1
            self._is_set_for_documents = False
        with self._leaving():
            yield

    @contextmanager
    def for_documents(self) -> Iterator[None]:
        """Wait until the processor is set for documents, or unused."""
        with self._queue, self._changed:
            self._changed.wait_for(lambda: self._is_set_for_documents or self._users == 0)
            self._users += 1
        with self._leaving():
            yield
            self._is_set_for_documents = True

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()
