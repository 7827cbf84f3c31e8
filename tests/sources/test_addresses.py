"""Lists and tables of web addresses are fetched from allowed hosts; other addresses as their file systems say."""

from pathlib import Path
from unittest.mock import Mock

import fsspec
import pytest
from source_files import parquet_file, read
from table_files import png, write_table

from cocoa_embed.errors import ImageError, UsageError
from cocoa_embed.images.http import Fetcher

HOSTS = {"allowed_hosts": ("photos.test",)}


@pytest.fixture(autouse=True)
def web(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for the web; ``test_http_images`` has the fetcher itself."""

    def fetch(self: Fetcher, address: str) -> bytes:
        assert [*self.allowed_hosts] == ["photos.test"]
        if "photos.test" not in address:
            raise ImageError(address, "is not among the allowed hosts")
        return png(int(address[-1]))

    monkeypatch.setattr(Fetcher, "fetch", fetch)


def test_one_address_is_an_image() -> None:
    address = "https://photos.test/a/1"
    found = read(address, **HOSTS)
    assert found.contents == {"1": png(1)}
    assert found.versions == {address: ""}


def test_a_list_of_addresses_is_read_line_by_line(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/listed/x.png", png(7))
    lines = ["# photos", "", "https://photos.test/1", "https://other.test/2", "memory://listed/x.png", "a.png"]
    (tmp_path / "list.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    found = read_uncovered(tmp_path / "list.txt")
    assert [*found.contents.values()] == [png(1), png(7)]
    assert found.faults[0] == "https://other.test/2: is not among the allowed hosts"
    assert found.faults[1] == f"{tmp_path / 'list.txt'}#6: has 'a.png' instead of an address"


def test_a_list_reaches_neither_this_machine_nor_hosts_that_are_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.png").write_bytes(png(1))
    monkeypatch.setattr("fsspec.core.url_to_fs", Mock(side_effect=AssertionError("asked")))
    local = [f"{protocol}://{tmp_path}/x.png" for protocol in ("file", "local", "c", "")]
    inside = [f"simplecache::{address}" for address in ("http://127.0.0.1/x.png", "https://photos.test/1")]
    hosts = [f"{protocol}://127.0.0.1/x.png" for protocol in ("ftp", "sftp", "smb", "webhdfs")]
    write_table(tmp_path / "rows.csv", [{"url": address} for address in (*local, *hosts, *inside)])
    found = read_uncovered(tmp_path / "rows.csv")
    assert found.contents == {}
    reasons = [fault.partition(": ")[2][:21] for fault in found.faults]
    assert reasons == ["cannot be read from a"] * 8 + ["is an address inside "] * 2


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_a_table_with_a_column_of_addresses_describes_the_images(tmp_path: Path, name: str) -> None:
    rows = [{"URL": f"https://photos.test/{number}", "caption": f"c {number}"} for number in range(3)]
    write_table(tmp_path / name, [*rows, {"URL": None, "caption": "none"}])
    found = read_uncovered(tmp_path / name)
    assert found.metadata["photos.test/2"] == {"text": "c 2"}
    assert [*found.contents.values()] == [png(number) for number in range(3)]
    assert "#3: has 'None' instead of an address" in found.faults[0] or "has '' instead" in found.faults[0]


@pytest.mark.parametrize("name", ["https://photos.test/1", "list.txt", "rows.parquet"])
def test_without_an_allowed_host_the_option_is_named_before_anything_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.txt").write_text("https://photos.test/1\n")
    (tmp_path / "rows.parquet").write_bytes(parquet_file([{"url": "https://photos.test/1"}]))
    with pytest.raises(UsageError, match=r"no host is allowed; give --allow-host photos\.test"):
        read(name if "://" in name else tmp_path / name)


def read_uncovered(place: Path) -> object:
    """Read a list: it does not cover what it lists, which another list may have, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cocoa_embed.sources.shard_files.ShardFiles.covers", lambda self, key: True)
        return read(place, **HOSTS)
