"""One queue in front of a model: the inputs of concurrent requests are embedded together."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # in Python 3.10 not the built-in one
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from cocoa_embed.encode.batches import token_counter
from cocoa_embed.encode.encoder import BATCH_TOKENS, Encoder, ModelInput
from cocoa_embed.errors import CocoaError, UsageError, one_line
from cocoa_embed.serve.limits import BusyError

BATCH_ITEMS = 32
"""The most inputs in a batch. A request queues no more at once, so that other requests get their turn."""


class Job(NamedTuple):
    """An input that waits for the model."""

    encode: Callable[..., Any]
    """The method of the model: for a query, or for a document."""
    item: ModelInput
    tokens: int
    """Visual tokens."""
    embedding: Future[np.ndarray]


class Batches:
    """A thread that embeds together the inputs that arrived while it embedded the previous batch."""

    def __init__(self, encoder: Encoder, seconds: float) -> None:
        """Start the thread.

        :param encoder: The encoder of the model; the queue returns whole embeddings.
        :param seconds: How long a request waits for its embeddings.
        """
        self.encoder = encoder.truncate(None, encoder.most_vectors)
        self._seconds = seconds
        self.visual_tokens = token_counter(encoder.model)
        self._tokenizer = own_tokenizer(encoder.model.tokenizer)
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="cocoa-batches", daemon=True)
        self._thread.start()

    def embed(self, encode: Callable[..., Any], inputs: Sequence[ModelInput]) -> np.ndarray:
        """Wait for the embeddings of inputs.

        :returns: float32, of the shape of the model's embeddings.
        :raises BusyError: If they are not ready in time, or the queue is closed.
        :raises Exception: What the model raises for one of the inputs.
        """
        deadline = time.monotonic() + self._seconds
        embeddings: list[np.ndarray] = []
        for start in range(0, len(inputs), BATCH_ITEMS):
            jobs = [Job(encode, each, self._tokens(each), Future()) for each in inputs[start : start + BATCH_ITEMS]]
            with self._changed:
                if self._is_closed:
                    raise BusyError("the server is stopping")
                self._jobs.extend(jobs)
                self._changed.notify()
            try:
                embeddings += [job.embedding.result(deadline - time.monotonic()) for job in jobs]
            except FutureTimeoutError:
                raise BusyError(f"the model did not finish within {self._seconds:g} seconds; try again") from None
            finally:
                for job in jobs:
                    job.embedding.cancel()
        return np.stack(embeddings)

    def count_tokens(self, inputs: Sequence[ModelInput]) -> int:
        """Return the tokens of the texts, without the model's prompt, and the visual tokens of the images."""
        texts = [str(each["text"]) for each in self.encoder._literal(inputs) if "text" in each]
        encoded = self._tokenizer.encode_batch(texts) if self._tokenizer else []
        return sum(map(len, encoded)) + sum(self._tokens(each) for each in inputs if "image" in each)

    def close(self) -> None:
        """Refuse waiting inputs, and end the thread after its current batch."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _tokens(self, item: ModelInput) -> int:
        image = item.get("image")
        return self.visual_tokens(*image.size) if isinstance(image, Image.Image) else 1

    def _run(self) -> None:
        for batch in iter(self._next_batch, None):
            self._embed_together([job for job in batch if job.embedding.set_running_or_notify_cancel()])
            del batch  # or its pictures would stay in memory while the next inputs are waited for

    def _next_batch(self) -> list[Job] | None:
        """Wait for inputs and take the first, with all others that fit in a batch with it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            if self._is_closed:
                for job in self._jobs:
                    if job.embedding.set_running_or_notify_cancel():
                        job.embedding.set_exception(BusyError("the server is stopping"))
                return None
            taken: list[Job] = []
            left: deque[Job] = deque()
            most = 0
            for job in self._jobs:
                padded = max(most, job.tokens) * (len(taken) + 1)
                fits = job.encode == self._jobs[0].encode and len(taken) < BATCH_ITEMS and padded <= BATCH_TOKENS
                (taken if fits or not taken else left).append(job)
                most = max(job.tokens for job in taken)
            self._jobs = left
            return taken

    def _embed_together(self, batch: Sequence[Job]) -> None:
        """Embed a batch; if the model refuses it, each input alone, so that one spoils no other."""
        if not batch:
            return
        try:
            embeddings = self.encoder._embed(batch[0].encode, [job.item for job in batch], BATCH_ITEMS)
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            if len(batch) == 1:
                batch[0].embedding.set_exception(error)
            else:
                for job in batch:
                    self._embed_together([job])
            return
        for job, embedding in zip(batch, embeddings, strict=True):
            job.embedding.set_result(embedding)


def own_tokenizer(tokenizer: object) -> Tokenizer | None:
    """Return a copy of a model's fast tokenizer that neither pads nor truncates; None if the tokenizer is slow.

    Calls of the model change the state of the model's own tokenizer, so other threads must not count with it.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    own: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    own.no_padding()
    own.no_truncation()
    return own


class BatchingEncoder(Encoder):
    """An encoder whose queries and documents, from any thread, go through one queue."""

    def __init__(self, batches: Batches, dimension: int | None = None) -> None:
        """Send inputs through a queue.

        :param dimension: Truncate every embedding to this many dimensions.
        """
        super().__init__(batches.encoder.model, batches.encoder.name, dimension)
        self.batches = batches

    def _embed(self, encode: Callable[..., Any], inputs: Sequence[ModelInput], batch_size: int) -> np.ndarray:
        try:
            return self._finish(self.batches.embed(encode, inputs))
        except BusyError:
            raise
        except CocoaError as error:
            raise UsageError(str(error)) from error
        except ValueError as error:  # processors refuse an image much longer than wide
            raise UsageError(f"{self.name} does not accept the input ({one_line(error)})") from error
