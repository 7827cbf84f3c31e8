import hashlib
import threading
from pathlib import Path

import pytest

from cocoa_embed.errors import ImageError
from cocoa_embed.integrations.qdrant.points import ImageFile, point_id
from cocoa_embed.integrations.qdrant.read_files import ReadFile, ahead, read_file


def test_a_file_is_read_with_its_hash_its_id_and_its_time(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    assert read_file(ImageFile(path, "a.png")) == ReadFile(point_id(sha256), sha256, b"content", path.stat().st_mtime)


def test_an_error_stays_in_its_place(tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).write_text(name)
    files = [ImageFile(tmp_path / name, name) for name in "abc"]
    first, second, third = (made for _, made in ahead(read_file, files))
    assert (first.data, third.data) == (b"a", b"c")
    assert isinstance(second, ImageError)
    assert second.reason == "does not exist"


def test_results_come_in_order_and_little_is_done_ahead() -> None:
    asked: list[int] = []
    threads = set()

    def give() -> object:
        for number in range(100):
            asked.append(number)
            threads.add(threading.current_thread())
            yield number

    for done, (given, made) in enumerate(ahead(lambda number: number * 2, give(), workers=3)):
        assert (given, made) == (done, 2 * done)
        assert len(asked) - done <= 6
    assert threads == {threading.main_thread()}


def test_whoever_stops_early_leaves_no_thread_behind() -> None:
    results = ahead(str, iter(range(1000)), workers=2)
    assert next(results) == (0, "0")
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cocoa-embed-reader")]


def test_an_error_of_what_is_given_comes_through() -> None:
    def give() -> object:
        yield 1
        raise RuntimeError("the list broke")

    with pytest.raises(RuntimeError, match="the list broke"):
        list(ahead(str, give()))
