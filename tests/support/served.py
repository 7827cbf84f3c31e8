"""An index that is served: in the process for one request after the other, or on loopback for many at once."""

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fake_model import FakeModel
from starlette.testclient import TestClient

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.serve.address import bind
from cocoa_embed.serve.limits import Limits
from cocoa_embed.serve.run import open_app

HERE = "http://127.0.0.1:8000"
KEY = "a-key-of-the-tests"


def index_files(storage: dict[str, Any], *places: Path, **options: Any) -> None:
    """Index files with the model made of arithmetic."""
    with QdrantIndexer(Encoder(FakeModel(), "fake"), **storage) as indexer:
        assert indexer.index(places, **options).indexed


@contextmanager
def served(
    storage: dict[str, Any], *, api_key: str | None = None, model: FakeModel | None = None, **limits: Any
) -> Iterator[TestClient]:
    """Serve an index in this process."""
    _, app = open_app(Encoder(model or FakeModel(), "fake"), None, storage, Limits(**limits), api_key)
    with TestClient(app, base_url=HERE, raise_server_exceptions=False) as client:
        yield client


@contextmanager
def listening(storage: dict[str, Any], *, model: FakeModel | None = None, **limits: Any) -> Iterator[str]:
    """Serve an index on loopback, in a thread; yield the address."""
    _, app = open_app(Encoder(model or FakeModel(), "fake"), None, storage, Limits(**limits), None)
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
            assert thread.is_alive()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def uri(file: Path) -> str:
    """Return a PNG file as a ``data:`` URI."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def message(response: Any) -> str:  # noqa: ANN401 - of starlette's client or httpx
    """Return the status and the message of an error, which is JSON and nothing else."""
    assert response.status_code >= 400, response.text
    document = response.json()
    assert list(document) == ["error"]
    assert list(document["error"]) == ["message"]
    return f"{response.status_code} {document['error']['message']}"
