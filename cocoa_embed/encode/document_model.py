"""``SentenceTransformer.encode_document`` for a batch of images, in steps that may overlap.

Prepare: images become tensors on the CPU, in any thread. Launch: the model runs; on CUDA the call returns early. Fetch:
the embeddings arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from cocoa_embed.encode.batches import token_counter
from cocoa_embed.encode.jobs import ModelInput
from cocoa_embed.encode.processor_lock import ProcessorLock

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Features: TypeAlias = Mapping[str, Any]

Fetch: TypeAlias = Callable[[], np.ndarray]
"""Waits for the embeddings of a launched batch; returns an array of shape ``(images, dimension)``, float32."""

DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""The names under which ``encode_document`` looks for a prompt, in this order."""


def document_prompt(model: SentenceTransformer) -> str | None:
    """Return the prompt that ``encode_document`` puts before a document, or None."""
    name = next((name for name in DOCUMENT_PROMPTS if name in model.prompts), model.default_prompt_name)
    return None if name is None else model.prompts.get(name)


class DocumentModel:
    """A model that embeds images as documents, batch by batch."""

    def __init__(self, model: SentenceTransformer, lock: ProcessorLock) -> None:
        """Put the model into evaluation mode, as ``encode`` does.

        :param lock: Guards the model's processor.
        """
        self._model = model.eval()
        self._lock = lock
        self._prompt = document_prompt(model)
        self.count_tokens = token_counter(model)
        self.is_on_cuda = model.device.type == "cuda"

    def prepare(self, inputs: Sequence[ModelInput]) -> Features:
        """Preprocess a batch; for CUDA, into pinned memory, which can be copied while the model runs.

        :param inputs: All with the same keys.

        :raises ValueError: If the processor refuses an image; some processors raise other errors.
        """
        with self._lock.use(for_documents=True):
            features = self._model.preprocess(list(inputs), prompt=self._prompt, task="document")
            return map_tensors(features, torch.Tensor.pin_memory) if self.is_on_cuda else features

    @torch.inference_mode()
    def launch(self, features: Features) -> Fetch:
        """Run the model on a batch, without waiting for its results if the device allows that.

        :raises torch.OutOfMemoryError: If the batch is too large for the device.
        """
        inputs = map_tensors(features, lambda tensor: tensor.to(self._model.device, non_blocking=True))
        embeddings = self._model(inputs, task="document")["sentence_embedding"]
        embeddings = embeddings[..., : self._model.truncate_dim].float()
        if embeddings.device.type != "cuda":
            return embeddings.cpu().numpy
        on_cpu = embeddings.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(embeddings.device))

        def fetch() -> np.ndarray:
            arrived.synchronize()
            return on_cpu.numpy()

        return fetch


def map_tensors(features: Features, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Apply ``change`` to the tensors of a batch, and to nothing else, such as the name of its modality."""
    return {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in features.items()}
