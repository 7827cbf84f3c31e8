"""Indexing runs in processes of their own, to be killed."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fake_model import FakeModel

SECONDS_PER_IMAGE = 0.01


class SlowModel(FakeModel):
    """Takes a moment for each image, so that a kill finds a run at work."""

    def _embed(self, item: object) -> Any:
        time.sleep(SECONDS_PER_IMAGE)
        return super()._embed(item)


def index_slowly(started: Connection, home: dict[str, str], folder: Path) -> None:
    """Index a folder, in groups of few points; tell when it begins."""
    from cocoa_embed.integrations import writer
    from cocoa_embed.integrations.qdrant import QdrantIndexer

    writer.POINTS_AT_ONCE = 3
    with QdrantIndexer(SlowModel(), **home, batch_size=3) as indexer:
        started.send("started")
        indexer.index(folder, prune=True, progress=False)


def run_and_kill(home: dict[str, str], folder: Path, seconds: float) -> bool:
    """Start a run, kill it after some seconds, and tell whether it was still at work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_runs", "cocoa_embed.integrations.qdrant", "torch"])
    ours, theirs = context.Pipe()
    process = context.Process(target=index_slowly, args=(theirs, home, folder))
    process.start()
    theirs.close()
    assert ours.recv() == "started"
    time.sleep(seconds)
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the run failed by itself"
    return process.exitcode != 0
