"""Run one model on several devices, in one process each, with the results of a single device.

The images are cut into chunks that do not depend on the number of devices, each chunk goes to the next free process,
and the results keep the order of the input. So the embeddings are the same for one device and for many.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.encode.description import Description
from cocoa_embed.encode.encoder import Encoder, Key, ModelInput
from cocoa_embed.encode.jobs import CaptionedImage, EmbeddedImage, StreamSource
from cocoa_embed.encode.lazy import DeferredEncoder, LazyEncoder, Wanted
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import CocoaError, ImageError, UsageError, one_line, until_error

LANES = 2
"""Chunks that a process works on at once, so that one is prepared while the model embeds the other."""

CHUNK_BATCHES = 4
"""Batches of images in a chunk."""

CHUNK_BYTES = 32 * 2**20
"""A chunk ends with the image that makes its files larger than this."""


class Lane(NamedTuple):
    """A connection to a process, for one request at a time."""

    connection: Connection
    device: str
    process: Any
    """A ``BaseProcess``, whose class depends on how processes are started."""


def read_devices(text: str) -> list[str]:
    """Return the torch devices of a list such as ``cuda:0,cuda:1``; ``all`` stands for all CUDA devices.

    :raises UsageError: If there is none.
    """
    if text == "all":
        import torch

        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    else:
        names = [name for part in text.split(",") if (name := part.strip())]
    if not names:
        raise UsageError(f"--devices {text} names no available device; give a list such as cuda:0,cuda:1, or cpu")
    return names


def open_encoder(model: str | Path, device: str | None = None, devices: str | None = None, **options: Any) -> Encoder:
    """Return a model on one device, or on several; it is loaded at first use.

    :param device: The torch device; None takes the fastest.
    :param devices: A list for ``read_devices``, instead of ``device``.
    :param options: ``dimension``, and options of ``load_encoder``.
    """
    if devices is None:
        return LazyEncoder(model, device, **options)
    return DeviceEncoder(model, read_devices(devices), **options)


class Processes:
    """The processes of a model, each with a few connections that take one request at a time."""

    def __init__(self, model: str | Path, devices: Sequence[str], options: dict[str, Any]) -> None:
        """Start the processes, and wait until each has loaded the model.

        :raises CocoaError: If one cannot load it.
        """
        # A process forked from one that uses CUDA cannot use CUDA; the fork server only imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "sentence_transformers"])
        cores = max(1, available_cores() // len(devices))
        self.lanes: list[Lane] = []
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for device in devices:
            ours, theirs = zip(*(context.Pipe() for _ in range(LANES)), strict=True)
            process = context.Process(target=serve, args=(theirs, model, device, options, cores), daemon=True)
            process.start()
            for connection in theirs:
                connection.close()
            self.lanes += [Lane(connection, device, process) for connection in ours]
        try:
            descriptions: list[Description] = [_answer_of(lane, None) for lane in self.lanes]
        except BaseException:
            self.close()
            raise
        self.description = descriptions[0]
        for lane in self.lanes:
            self._free.put(lane)

    def ask(self, method: str, wanted: Wanted, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        """Return what a method of a process's encoder returns; wait for a process that is free.

        :param wanted: The shape of the embeddings.
        :raises CocoaError: If the process has ended, or the method raises an error.
        """
        lane = self._free.get()
        try:
            return _answer_of(lane, (method, wanted, arguments, options))
        finally:
            self._free.put(lane)  # even if its process has ended, so that no thread waits for it forever

    def close(self) -> None:
        """End the processes: terminate them if any is busy, otherwise close their connections."""
        is_idle = self._free.qsize() == len(self.lanes)
        for lane in self.lanes:
            lane.connection.close() if is_idle else lane.process.terminate()
        for lane in self.lanes:
            lane.process.join()


class DeviceEncoder(DeferredEncoder):
    """An encoder whose model is in other processes, one for each device; they are started at first use."""

    def __init__(self, model: str | Path, devices: Sequence[str], dimension: int | None = None, **options: Any) -> None:
        """Name the model and the devices; nothing is started yet.

        :param model: A folder or a name on the hub, which every process loads.
        :param devices: Torch devices; one that is listed twice gets two processes.
        :param dimension: Truncate every embedding to this many dimensions.
        :param options: Options of ``load_encoder``.
        """
        super().__init__(model, dimension, options, partial(Processes, model, devices, options))

    @property
    def processes(self) -> Processes:
        """The processes, which are started if they are not running.

        :raises CocoaError: If one cannot load the model.
        """
        found: Processes = self.started
        return found

    def embed_queries(self, inputs: Sequence[ModelInput], batch_size: int = 32) -> np.ndarray:
        """Embed queries as ``Encoder.embed_queries`` does, on one of the devices."""
        return np.asarray(self.processes.ask("embed_queries", self._wanted, list(inputs), batch_size))

    def embed_documents(self, inputs: Sequence[ModelInput], batch_size: int = 32) -> np.ndarray:
        """Embed documents as ``Encoder.embed_documents`` does, on one of the devices."""
        return np.asarray(self.processes.ask("embed_documents", self._wanted, list(inputs), batch_size))

    def stream_images(
        self, images: Iterable[tuple[Key, StreamSource]], *, batch_size: int = 32, **options: Any
    ) -> Iterator[tuple[Key, EmbeddedImage | ImageError]]:
        """Embed images as ``Encoder.stream_images`` does, in the order given, on all devices.

        An error of ``images`` is raised after all images before it are yielded.

        :raises CocoaError: If a process ends, or the model does not embed images.
        """
        self.require_images()
        processes = self.processes

        def embed(chunk: list[tuple[Key, StreamSource]]) -> list[EmbeddedImage | ImageError]:
            named = [(str(key), source) for key, source in chunk]
            answers: list[EmbeddedImage | ImageError]
            answers = processes.ask("stream_images", self._wanted, named, batch_size=batch_size, **options)
            return answers

        errors: list[Exception] = []
        lanes, chunks = len(processes.lanes), cut(until_error(images, errors), CHUNK_BATCHES * batch_size)
        with closing(read_ahead(embed, chunks, workers=lanes, ahead=lanes)) as embedded:
            try:
                for chunk, outcomes in embedded:
                    yield from zip((key for key, _ in chunk), outcomes.result(), strict=True)
            except BaseException:
                self.close()  # or the threads would wait for the chunks that are being embedded
                raise
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the processes; the next use starts them again."""
        with self._lock:
            while self._started:
                self._started.pop().close()


def cut(images: Iterable[tuple[Key, StreamSource]], most: int) -> Iterator[list[tuple[Key, StreamSource]]]:
    """Yield images in lists of at most ``most``, and of not much more than ``CHUNK_BYTES``."""
    chunk: list[tuple[Key, StreamSource]] = []
    size = 0
    for key, source in images:
        chunk.append((key, source))
        data = source.data if isinstance(source, CaptionedImage) else source
        size += len(data) if isinstance(data, bytes) else 0
        if len(chunk) == most or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _answer_of(lane: Lane, request: object) -> Any:  # noqa: ANN401
    """Send a request to a process and return its answer.

    :raises CocoaError: If the process ends, or answers with an error.
    """
    try:
        lane.connection.send(request)
        answer = lane.connection.recv()
    except (EOFError, OSError):
        lane.process.join(timeout=5)
        raise CocoaError(
            f"the process for {lane.device} ended (exit status {lane.process.exitcode}), perhaps for lack of memory;"
            " start again: what is already stored is not embedded again"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def serve(
    connections: Sequence[Connection], model: str | Path, device: str, options: dict[str, Any], cores: int
) -> None:
    """Answer the requests of each connection until it is closed; this is the main function of each process."""
    # Ctrl-C reaches every process of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    loaded: Encoder | Exception
    try:
        if device == "cpu":
            import torch

            torch.set_num_threads(min(cores, torch.get_num_threads()))
        loaded = load_encoder(model, device, **options)
    except Exception as error:  # noqa: BLE001 - the process that asks raises it
        loaded = error
    threads = [threading.Thread(target=_answer_all, args=(each, loaded)) for each in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answer_all(connection: Connection, encoder: Encoder | Exception) -> None:
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = _answer(request, encoder)
        except CocoaError as error:
            answer = error
        except Exception as error:  # noqa: BLE001 - or the process that asks would wait for ever
            answer = CocoaError(f"the model failed ({type(error).__name__}: {one_line(error)})")
        try:
            connection.send(answer)
        except OSError:
            return


def _answer(request: Any, encoder: Encoder | Exception) -> Any:  # noqa: ANN401
    if isinstance(encoder, Exception):
        raise encoder
    if request is None:
        return encoder.description
    method, wanted, arguments, options = request
    used = encoder.truncate(*wanted)
    if method == "stream_images":
        return [outcome for _, outcome in used.stream_images(*arguments, **options)]
    return getattr(used, method)(*arguments, **options)
