"""``SentenceTransformer.encode_document`` for a batch of images, cut into steps that may overlap.

Prepare: images become tensors on the CPU, in any thread. Launch: the model runs; on CUDA the call returns early. Fetch:
the embeddings arrive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Return the prompt that ``encode_document`` puts before a document; None if there is none."""
    for name in DOCUMENT_PROMPTS:
        if name in model.prompts:
            return model.prompts[name]
    return None if model.default_prompt_name is None else model.prompts.get(model.default_prompt_name)


@dataclass(frozen=True)
class LaunchedBatch:
    """Embeddings that may not have arrived from the device yet."""

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
        """Preprocess a batch; for CUDA into memory that is copied while the model runs.

        :raises ValueError: If the processor refuses an image; processors raise other errors for it too.
        """
        features = self._model.preprocess([{"image": image} for image in images], prompt=self._prompt, task="document")
        if not self.is_on_cuda:
            return features
        return {name: value.pin_memory() if is_tensor(value) else value for name, value in features.items()}

    @torch.inference_mode()
    def launch(self, features: Features) -> LaunchedBatch:
        """Run the model on a batch, without waiting for its results where the device allows that.

        :raises torch.OutOfMemoryError: If the batch is too large for the device.
        """
        device = self._model.device
        inputs = {
            name: value.to(device, non_blocking=True) if is_tensor(value) else value for name, value in features.items()
        }
        embeddings = self._model(inputs, task="document")["sentence_embedding"]
        embeddings = embeddings[..., : self._model.truncate_dim].float()
        if embeddings.device.type != "cuda":
            return LaunchedBatch(embeddings.cpu(), None)
        arriving = embeddings.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(embeddings.device))
        return LaunchedBatch(arriving, arrived)


def is_tensor(value: object) -> bool:
    """Return whether a value of a batch is a tensor, and not, for example, the name of its modality."""
    return isinstance(value, torch.Tensor)
