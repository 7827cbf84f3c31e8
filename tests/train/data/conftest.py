from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of rows and images of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("COCOA_CACHE", str(folder))
    return folder / "rows"
