import pytest

from cocoa_embed.integrations.qdrant.stores import base


@pytest.fixture
def few_payload_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Create two payload indexes in new collections: each takes Qdrant Edge a tenth of a second."""
    monkeypatch.setattr(base, "PAYLOAD_INDEXES", {"mime": base.KEYWORD, "caption": base.TEXT})
