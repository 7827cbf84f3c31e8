"""Run images through a model while later ones are read and prepared in threads; results in the input's order.

The stream is three generators: files are read and measured, windows of them are cut into batches of similar sizes, and
the batches are decoded and preprocessed. The calling thread runs the model on these batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.encode.batches import BatchLimits, plan_batches
from cocoa_embed.encode.document_model import DocumentModel, Features, Fetch
from cocoa_embed.encode.jobs import (
    REFUSALS,
    CaptionedImage,
    EmbeddedImage,
    ImageJob,
    ModelInput,
    StreamSource,
    decode,
    measure,
)
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import CocoaError, ImageError, one_line, printable, until_error

MAX_WORKERS = 12
CORES_PER_WORKER = 4
"""On a CPU, cores for each worker that prepares images; the model needs the cores too."""

MAX_BATCH_BYTES = 128 * 2**20
"""The decoded images of a batch (128 MiB); a window holds at most as much as two batches."""

MAX_WINDOW_BATCHES = 4
"""Batches' worth of images that are sorted together. Windows grow to it, so that the first batch is ready soon."""


def default_workers(*, is_on_cpu: bool) -> int:
    """Return how many threads prepare images while the model runs."""
    cores = available_cores()
    return max(1, cores // CORES_PER_WORKER if is_on_cpu else min(MAX_WORKERS, cores - 1))


@dataclass(kw_only=True, eq=False)
class ImageStream:
    """One pass of images through a model."""

    model: DocumentModel
    images: Iterable[tuple[Any, StreamSource]]
    literal: Callable[[Sequence[ModelInput]], list[ModelInput]]
    """Returns inputs in whose texts special tokens are read as plain characters."""
    turn: Callable[[], AbstractContextManager[None]]
    """Held while the model runs on a batch."""
    finish: Callable[[np.ndarray], np.ndarray]
    """Maps the model's embeddings to the ones that the stream yields."""
    workers: int
    """The threads that decode and preprocess."""
    batch_size: int
    batch_tokens: int
    thumbnail_size: int | None
    """The longest side of thumbnails, in pixels; None for no thumbnails."""
    _unfinished: deque[ImageJob] = field(default_factory=deque, init=False)
    _launched: deque[tuple[list[ImageJob], Fetch]] = field(default_factory=deque, init=False)
    _input_errors: list[Exception] = field(default_factory=list, init=False)

    def run(self) -> Iterator[tuple[Any, EmbeddedImage | ImageError]]:
        """Yield each key with its embedding, or with the error of an image that cannot be used.

        An error of the input is raised after all images before it.

        :raises CocoaError: If the device is lost.
        """
        with ExitStack() as stack:
            jobs_in_order = until_error(self._jobs(), self._input_errors)
            measured = read_ahead(
                lambda job: measure(job, self.model.count_tokens), jobs_in_order, ahead=2 * self.batch_size
            )
            batches = self._batches(stack.enter_context(closing(measured)))
            prepared = read_ahead(
                self._prepare, stack.enter_context(closing(batches)), workers=self.workers, ahead=self.workers + 2
            )
            for jobs, features in stack.enter_context(closing(prepared)):
                self._embed(jobs, features.result)
                yield from self._finished()
            self._fetch(0)
            yield from self._finished()
        for error in self._input_errors:
            raise error

    def _jobs(self) -> Iterator[ImageJob]:
        """Yield the images of the input as jobs."""
        for key, source in self.images:
            name = printable(source if isinstance(source, str | Path) else str(key))
            image, text = source if isinstance(source, CaptionedImage) else (source, None)
            job = ImageJob(key, name, image, text)
            self._unfinished.append(job)
            yield job

    def _batches(self, measured: Iterator[tuple[ImageJob, Future[None]]]) -> Generator[list[ImageJob]]:
        """Cut the input into windows, and each window into batches of similar sizes."""
        window: list[ImageJob] = []
        window_batches = 1
        for job, measuring in measured:
            measuring.result()
            window.append(job)
            is_large = sum(job.bytes_held for job in window) >= 2 * MAX_BATCH_BYTES
            if is_large or len(window) >= window_batches * self.batch_size:
                yield from self._plan(window)
                window, window_batches = [], min(2 * window_batches, MAX_WINDOW_BATCHES)
        yield from self._plan(window)

    def _plan(self, window: list[ImageJob]) -> list[list[ImageJob]]:
        """Return the batches of a window; an empty one if all its images failed, so that their errors are yielded."""
        limits = BatchLimits(self.batch_size, self.batch_tokens, MAX_BATCH_BYTES)
        planned: list[list[ImageJob]] = []
        for has_text in (False, True):  # a batch has inputs of one kind
            jobs = [job for job in window if job.outcome is None and (job.text is not None) == has_text]
            batches = plan_batches([job.cost for job in jobs], limits)
            planned += [[jobs[index] for index in indices] for indices in batches]
        return planned or [[]]

    def _prepare(self, jobs: list[ImageJob]) -> Features:
        """Decode and preprocess a batch, and finish the jobs whose images are broken.

        :raises Exception: One of ``REFUSALS``, if the processor does not take an image.
        """
        inputs: list[ModelInput] = []
        for job in jobs:
            try:
                image = decode(job, self.thumbnail_size)
                inputs.append({"image": image} if job.text is None else {"image": image, "text": job.text})
            except ImageError as error:
                job.finish(error)
        return self.model.prepare(self.literal(inputs)) if inputs else {}

    def _embed(self, jobs: list[ImageJob], prepare: Callable[[], Features]) -> None:
        """Run the model on a batch; on its halves if the processor or the model refuses the whole."""
        try:
            features = prepare()
            jobs = [job for job in jobs if job.outcome is None]
            if not jobs:
                return
            with self.turn():
                fetch = self.model.launch(features)
        except torch.OutOfMemoryError as error:
            # Batches that are planned from now on fit at once.
            tokens = len(jobs) * max(job.cost.tokens for job in jobs)
            self.batch_tokens = max(1, min(self.batch_tokens, tokens // 2))
            self._embed_halves(jobs, error)
        except REFUSALS as error:
            if "CUDA error" in str(error):  # the device is lost: no image is at fault
                raise CocoaError(f"the device cannot continue; start again ({one_line(error)})") from error
            self._embed_halves(jobs, error)
        else:
            self._launched.append((jobs, fetch))
            # On CUDA the next batch is launched before the embeddings of the last are fetched.
            self._fetch(1 if self.model.is_on_cuda else 0)

    def _embed_halves(self, jobs: list[ImageJob], error: Exception) -> None:
        jobs = [job for job in jobs if job.outcome is None]
        if len(jobs) == 1:
            jobs[0].refuse(error)
            return
        if self.model.is_on_cuda:
            torch.cuda.empty_cache()
        middle = len(jobs) // 2
        for half in jobs[:middle], jobs[middle:]:
            self._embed(half, partial(self._prepare, half))

    def _fetch(self, most_launched: int) -> None:
        """Finish the jobs of launched batches, the oldest first, until at most ``most_launched`` batches are left."""
        while len(self._launched) > most_launched:
            jobs, fetch = self._launched.popleft()
            for job, vector in zip(jobs, self.finish(fetch()), strict=True):
                if np.isfinite(vector).all():
                    _, width, height = job.cost
                    job.finish(EmbeddedImage(vector.copy(), width, height, job.mime, job.thumbnail))
                else:
                    job.finish(ImageError(job.name, "has an embedding that is not finite"))

    def _finished(self) -> Iterator[tuple[Any, EmbeddedImage | ImageError]]:
        """Yield outcomes in the order of the input, up to the first image that has none yet."""
        while self._unfinished and (outcome := self._unfinished[0].outcome) is not None:
            yield self._unfinished.popleft().key, outcome
