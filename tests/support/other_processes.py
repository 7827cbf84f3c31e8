"""Work in other processes that are killed or run out of disk space."""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
from fake_model import FakeModel
from fake_qdrant import SIGNATURE, make_points

from cocoa_embed.errors import CocoaError

SECONDS_PER_IMAGE = 0.01
BATCH = 7

Location = dict[str, str]
"""The keyword of a storage backend, and its folder."""


class SlowModel(FakeModel):
    """Takes a moment for each image, so that a kill interrupts a run."""

    def _embed(self, item: object) -> np.ndarray:
        time.sleep(SECONDS_PER_IMAGE)
        return super()._embed(item)


def index_slowly(reports: Connection, location: Location, folder: Path) -> None:
    from cocoa_embed.integrations.qdrant import QdrantIndexer
    from cocoa_embed.integrations.qdrant.indexing import writer

    writer.BATCH_POINTS = 3
    with QdrantIndexer(SlowModel(), **location, batch_size=3) as indexer:
        reports.send("started")
        indexer.index(folder, prune=True, progress=False)


def index_with_little_disk(reports: Connection, location: Location, folder: Path, max_file_bytes: int) -> None:
    """Index a folder where no file may grow beyond a size; report the error."""
    from cocoa_embed.integrations.qdrant import QdrantIndexer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    try:
        with QdrantIndexer(FakeModel(), **location) as indexer:
            indexer.index(folder, progress=False)
    except CocoaError as error:
        reports.send(str(error))


def fill(reports: Connection, location: Location, start: int, batch: int, text_bytes: int) -> None:
    """Upsert batches until the store fails; report the number of points after each batch, and the error."""
    from cocoa_embed.integrations.qdrant.stores import open_store

    store = open_store(**location, collection="images")
    reports.send(start)
    if store.signature() is None:
        store.create(SIGNATURE)
    try:
        while True:
            store.insert(make_points(start, start + batch, text=os.urandom(text_bytes // 2).hex()))
            start += batch
            reports.send(start)
    except CocoaError as error:
        reports.send(str(error))
        store.close()


def start(work: Callable[..., None], *arguments: object) -> tuple[ForkServerProcess, Connection]:
    """Start work in a process that has everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["other_processes", "cocoa_embed.integrations.qdrant.indexer", "torch"])
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments))
    process.start()
    theirs.close()
    return process, ours


def run(work: Callable[..., None], *arguments: object) -> list[Any]:
    """Run work to its end and return its reports."""
    return run_and_kill(None, work, *arguments)[1]


def run_and_kill(seconds: float | None, work: Callable[..., None], *arguments: object) -> tuple[bool, list[Any]]:
    """Kill work ``seconds`` after its first report; return whether it was still running, and its reports."""
    process, reports = start(work, *arguments)
    values = [reports.recv()]
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    with contextlib.suppress(EOFError):
        while True:
            values.append(reports.recv())
    process.join()
    assert process.exitcode in (0, None if seconds is None else -signal.SIGKILL), "the work failed by itself"
    return process.exitcode != 0, values
