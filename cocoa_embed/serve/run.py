"""Run the server: open the collection, load its model, and answer requests until a signal arrives."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.model.loading import check_model
from cocoa_embed.serve.app import make_app
from cocoa_embed.serve.batching import Batches, BatchingEncoder
from cocoa_embed.serve.limits import Limits

STOP_SECONDS = 5
"""How long requests in progress may still take when the server is stopped."""


def model_of(store: Store) -> str:
    """Return the model that made a collection.

    :raises CocoaError: If the collection does not name it, or the model cannot be found.
    """
    signature = store.require_signature()
    if signature.fingerprint is None:
        raise CocoaError(f"{store.name} was not made by cocoa-embed index; give the model that made its vectors")
    try:
        check_model(signature.model)
    except CocoaError as error:
        raise CocoaError(
            f"{store.name} was made with {signature.model}, which cannot be found; give the folder or hub name of"
            " this model"
        ) from error
    return signature.model


def open_app(
    model: str | Encoder | None,
    device: str | None,
    storage: dict[str, Any],
    limits: Limits,
    api_key: str | None,
    max_pixels: int | None = None,
) -> tuple[QdrantIndexer, Starlette]:
    """Open a collection, load its model, and return the indexer and its application.

    :param model: Its name, or the loaded model; None takes the one that made the collection.
    :param storage: The arguments of ``QdrantIndexer`` that name the collection.
    :param max_pixels: Larger images are scaled down to this; None takes the model's own limit.
    :raises CocoaError: If there is no such collection, or another model made it.
    """
    store = QdrantIndexer(None, **storage).store
    store.require_signature()  # before the model, which takes seconds
    if isinstance(model, Encoder):
        encoder = model
    else:
        encoder = load_encoder(model or model_of(store), device, max_pixels=max_pixels)
    batches = Batches(encoder, limits.seconds)
    indexer = QdrantIndexer(BatchingEncoder(batches), **storage)
    indexer.store = store  # opening a local one again would read all of it again
    try:
        indexer.require_model()
    except BaseException:
        batches.close()
        indexer.close()
        raise
    return indexer, make_app(indexer, batches, limits, api_key)


def answer_requests(app: Starlette, bound: socket.socket, on_ready: Callable[[], object]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish those that are being answered.

    :param on_ready: Called as soon as clients can connect.
    :raises KeyboardInterrupt: After Ctrl-C.
    :raises SystemExit: After SIGTERM, with status 143.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # uvicorn raises it again at its end
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "on"}
    options |= {"timeout_graceful_shutdown": STOP_SECONDS, "ws": "none"}
    bound.listen()
    on_ready()
    uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[bound])
