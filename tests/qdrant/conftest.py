import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fake_qdrant import SIGNATURE, FakeServer, fake_server

from cocoa_embed.integrations.qdrant.stores import base, open_store
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions
from cocoa_embed.integrations.qdrant.stores.store import Store


@pytest.fixture
def few_payload_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Create two payload indexes in new collections: each takes Qdrant Edge a tenth of a second."""
    monkeypatch.setattr(base, "PAYLOAD_INDEXES", {"mime": base.KEYWORD, "caption": base.TEXT})


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a store would have waited before further attempts."""
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", Mock(sleep=waits.append))
    return waits


@pytest.fixture(params=["client", "path", "url", "edge"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def opener(backend: str, server: FakeServer, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens a collection in one backend; folders are in ``tmp_path``."""
    with contextlib.ExitStack() as stack:
        locations: dict[str, Any] = {"client": server.client, "url": server.url}

        def open_(collection: str = "images", folder: str = "store", **options: Any) -> Store:
            location = {backend: locations.get(backend, tmp_path / folder)}
            store = open_store(**location, collection=collection, options=StoreOptions(**options))
            stack.callback(store.close)
            return store

        yield open_


@pytest.fixture
def store(opener: Callable[..., Store]) -> Store:
    store = opener()
    store.create(SIGNATURE)
    return store
