"""Indexing runs in processes of their own: to be killed, to run out of disk, to hold a store."""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
from fake_model import FakeModel

from cocoa_embed.errors import CocoaError

SECONDS_PER_IMAGE = 0.01

Home = dict[str, str]


class SlowModel(FakeModel):
    """Takes a moment for each image, so that a kill finds a run at work."""

    def _embed(self, item: object) -> np.ndarray:
        time.sleep(SECONDS_PER_IMAGE)
        return super()._embed(item)


def index_slowly(told: Connection, home: Home, folder: Path) -> None:
    """Index a folder, in groups of few points; tell when it begins."""
    from cocoa_embed.integrations.qdrant import writer
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

    writer.POINTS_AT_ONCE = 3
    with QdrantIndexer(SlowModel(), **home, batch_size=3) as indexer:
        told.send("started")
        indexer.index(folder, prune=True, progress=False)


def index_with_little_disk(told: Connection, home: Home, folder: Path, bytes_a_file: int) -> None:
    """Index a folder where no file may grow beyond a size; tell the error."""
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
    try:
        with QdrantIndexer(FakeModel(), **home) as indexer:
            indexer.index(folder, progress=False)
    except CocoaError as error:
        told.send(str(error))


def hold(told: Connection, home: Home, folder: Path) -> None:
    """Open a store, and keep it until the process is ended."""
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

    with QdrantIndexer(FakeModel(), **home) as indexer:
        indexer.index(folder, progress=False)
        told.send("holding")
        time.sleep(600)


def start(work: Callable[..., None], *arguments: object) -> tuple[ForkServerProcess, Connection]:
    """Start work in a process that has everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["other_processes", "cocoa_embed.integrations.qdrant.indexer", "torch"])
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments))
    process.start()
    theirs.close()
    return process, ours


def run_and_kill(home: Home, folder: Path, seconds: float) -> bool:
    """Start a run, kill it after some seconds, and tell whether it was still at work."""
    process, told = start(index_slowly, home, folder)
    assert told.recv() == "started"
    time.sleep(seconds)
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the run failed by itself"
    return process.exitcode != 0


def run_on_a_full_disk(home: Home, folder: Path, bytes_a_file: int) -> str:
    """Return the error of a run where no file may grow beyond a size."""
    process, told = start(index_with_little_disk, home, folder, bytes_a_file)
    error = told.recv()
    process.join()
    return str(error)


@contextlib.contextmanager
def index_in_another_process(home: Home, folder: Path) -> Iterator[None]:
    """Let another process index a folder and hold the store."""
    process, told = start(hold, home, folder)
    assert told.recv() == "holding"
    try:
        yield
    finally:
        process.kill()
        process.join()
