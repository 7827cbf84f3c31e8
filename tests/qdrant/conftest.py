import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_qdrant import SIGNATURE, fake_server

from cocoa_embed.integrations.qdrant.stores import base, open_store
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions
from cocoa_embed.integrations.qdrant.stores.store import Store


@pytest.fixture
def few_payload_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Create two payload indexes in new collections: each takes Qdrant Edge a tenth of a second."""
    monkeypatch.setattr(base, "PAYLOAD_INDEXES", {"mime": base.KEYWORD, "caption": base.TEXT})


@pytest.fixture
def opener(backend: str, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens a collection in one backend; folders are in ``tmp_path``."""
    with fake_server() as server, contextlib.ExitStack() as stack:
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
