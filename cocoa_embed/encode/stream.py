"""Images through a model while others are prepared for it: in batches of similar sizes, out in the input's order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import torch

from cocoa_embed.encode.cpu_threads import CoreShare, available_cores, start_workers, torch_threads
from cocoa_embed.encode.document_model import DocumentModel, Launched
from cocoa_embed.encode.prefetch import Prefetcher
from cocoa_embed.encode.prepare import REFUSALS, Batch, EmbeddedImage, Piece, prepare_batch, refusal
from cocoa_embed.errors import CocoaError, ImageError, one_line

MAX_WORKERS = 12
CORES_A_WORKER = 4
"""On a CPU, one core in so many prepares what the model on the others needs."""


def default_workers(*, is_on_cpu: bool) -> int:
    """Return how many threads are to prepare images beside the model: on a CPU, few, for the model needs the cores."""
    cores = available_cores()
    return max(1, cores // CORES_A_WORKER if is_on_cpu else min(MAX_WORKERS, cores - 1))


class ImageStream:
    """One pass of images through a model."""

    def __init__(
        self,
        model: DocumentModel,
        prefetcher: Prefetcher,
        *,
        workers: int,
        turn: Callable[[], AbstractContextManager[None]],
        finish: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Start nothing yet.

        :param workers: The threads that prepare images while the model runs.
        :param turn: Held while the model runs on a batch.
        :param finish: Makes of the model's embeddings what is given out.
        """
        self._model = model
        self._prefetcher = prefetcher
        self._workers = workers
        self._turn = turn
        self._finish = finish
        self._share: CoreShare | None = None
        if model.is_on_cpu:
            self._share = CoreShare(workers=workers, cores=available_cores(), threads=torch.get_num_threads())
        self._launched: deque[tuple[Piece, Launched]] = deque()
        # On CUDA the next batch is launched before the embeddings of the last are fetched.
        self._most_launched = 1 if model.is_on_cuda else 0

    def run(self) -> Iterator[tuple[Any, EmbeddedImage | ImageError]]:
        """Yield each key with its embedding, or with why there is none.

        :raises CocoaError: If the device cannot go on.
        """
        with ExitStack() as stack:
            stack.callback(self._prefetcher.close)
            pools = self._start_workers(stack)
            while not self._prefetcher.is_exhausted:
                in_turn = self._is_in_turn()
                self._advance(pools[in_turn], in_turn)
                if self._prefetcher.ahead:
                    started = perf_counter()
                    batch = self._prefetcher.ahead.popleft().result()
                    self._embed(batch, in_turn, waited=perf_counter() - started)
                else:
                    self._fetch(0)
                yield from self._prefetcher.finished()
        if self._prefetcher.fault is not None:
            raise self._prefetcher.fault

    def _start_workers(self, stack: ExitStack) -> dict[bool, ThreadPoolExecutor]:
        """Start the workers that run beside the model and, where there is a choice, those that run in turn with it."""
        counts = {False: self._workers}
        if self._share is not None and self._share.has_choice:
            counts[True] = self._share.cores
        pools = {}
        for in_turn, count in counts.items():
            pools[in_turn] = start_workers(count, "cocoa-worker")
            stack.callback(pools[in_turn].shutdown, wait=True, cancel_futures=True)
        return pools

    def _is_in_turn(self) -> bool:
        """Tell whether the workers are to wait while the model runs on the next batch."""
        return self._share is not None and self._share.is_in_turn(is_all_prepared=self._prefetcher.is_all_prepared)

    def _advance(self, workers: ThreadPoolExecutor, in_turn: bool) -> None:
        """Have further batches prepared; in turn only when the last is used up, and all of them before any runs."""
        if not in_turn:
            self._prefetcher.advance(workers, wait=False)
            return
        if self._prefetcher.ahead:
            self._prefetcher.gather()
        else:
            self._prefetcher.advance(workers, wait=True)
        wait(self._prefetcher.ahead)

    def _embed(self, batch: Batch, in_turn: bool, *, waited: float = 0.0) -> None:
        for passenger, error in batch.refused:
            self._prefetcher.settle(passenger, error)
        for piece in batch.pieces:
            seconds = self._run_piece(piece, in_turn)
            if self._share is not None and seconds is not None and len(batch.pieces) == 1:
                self._share.note(in_turn, work=piece.tokens, model=seconds, waiting=waited, preparing=batch.seconds)

    def _run_piece(self, piece: Piece, in_turn: bool) -> float | None:
        """Run the model on a piece; on its halves, if it does not take the whole.

        :return: The seconds that the model took; None if it did not take the whole.
        """
        passenger = piece.passengers[0]
        try:
            launched, seconds = self._launch(piece, in_turn)
        except torch.OutOfMemoryError as error:
            refused = refusal(passenger, error)
            # What is planned from now on is to fit at once.
            self._prefetcher.batch_tokens = max(1, min(self._prefetcher.batch_tokens, piece.tokens // 2))
        except REFUSALS as error:
            if "CUDA error" in str(error):  # the device is lost, and every image would be blamed for it
                raise CocoaError(f"the device cannot go on; start again ({one_line(error)})") from error
            refused = refusal(passenger, error)
        else:
            self._launched.append((piece, launched))
            self._fetch(self._most_launched)
            return seconds
        if len(piece.passengers) == 1:
            self._prefetcher.settle(passenger, refused)
        else:
            self._run_halves(piece, in_turn)
        return None

    def _run_halves(self, piece: Piece, in_turn: bool) -> None:
        if self._model.is_on_cuda:
            torch.cuda.empty_cache()
        middle = len(piece.passengers) // 2
        for half in piece.passengers[:middle], piece.passengers[middle:]:
            self._embed(prepare_batch(half, self._prefetcher.prepare, self._prefetcher.thumbnail_size), in_turn)

    def _launch(self, piece: Piece, in_turn: bool) -> tuple[Launched, float]:
        share = self._share
        threads = nullcontext() if share is None else torch_threads(share.threads(in_turn))
        with self._turn(), threads:
            started = perf_counter()
            return self._model.launch(piece.features), perf_counter() - started

    def _fetch(self, most_launched: int) -> None:
        """Settle the images of launched pieces, the oldest first, until so many pieces are left."""
        while len(self._launched) > most_launched:
            piece, launched = self._launched.popleft()
            vectors = self._finish(launched.fetch())
            for passenger, vector in zip(piece.passengers, vectors, strict=True):
                outcome: EmbeddedImage | ImageError
                if np.isfinite(vector).all():
                    outcome = EmbeddedImage(
                        vector.copy(), passenger.width, passenger.height, passenger.mime, passenger.thumbnail
                    )
                else:
                    outcome = ImageError(passenger.name, "has an embedding that is not finite")
                self._prefetcher.settle(passenger, outcome)
