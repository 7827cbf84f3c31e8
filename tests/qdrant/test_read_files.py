import hashlib
from pathlib import Path

from cocoa_embed.errors import ImageError
from cocoa_embed.integrations.qdrant.points import ImageFile, point_id
from cocoa_embed.integrations.qdrant.read_files import ReadFile, read_file


def test_a_file_is_read_with_its_hash_its_id_and_its_time(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    assert read_file(ImageFile(path, "a.png")) == ReadFile(point_id(sha256), sha256, b"content", path.stat().st_mtime)


def test_an_error_is_returned(tmp_path: Path) -> None:
    error = read_file(ImageFile(tmp_path / "a", "a"))
    assert isinstance(error, ImageError)
    assert error.reason == "does not exist"
