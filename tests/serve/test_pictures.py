"""Pictures by point id: what is served, and that nothing else of the machine is."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fake_model import colour_image, write_colours
from PIL import Image
from served import index_files, message, served
from source_files import parquet_file, pdf, tar, video
from starlette.testclient import TestClient

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.serve.pictures import JPEG_SIDE, Pictures, read_picture
from cocoa_embed.sources.base import SourceOptions


def ids(client: TestClient) -> dict[str, str]:
    """Return the ids of all points by their relative path."""
    hits = client.post("/search", json={"text": "red", "limit": 100}).json()["hits"]
    return {hit["payload"]["relative_path"]: hit["id"] for hit in hits}


def opened(response: Any) -> Image.Image:  # noqa: ANN401
    assert response.status_code == 200, response.text
    return Image.open(io.BytesIO(response.content))


def test_a_thumbnail_is_a_small_jpeg_and_the_image_the_file_itself(storage: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    colour_image("red", (900, 600)).save(tmp_path / "in" / "red.png")
    index_files(storage, tmp_path / "in")
    with served(storage) as client:
        (id_,) = ids(client).values()
        small = opened(client.get(f"/thumbnail/{id_}"))
        assert (small.format, small.size) == ("JPEG", (320, 213))
        assert opened(client.get(f"/thumbnail/{id_}?size=30")).size == (30, 20)
        image = client.get(f"/image/{id_}")
        assert image.content == (tmp_path / "in" / "red.png").read_bytes()
        assert (image.headers["content-type"], image.headers["x-content-type-options"]) == ("image/png", "nosniff")
        for size in ("0", "99999", "-5", "x", "9" * 5000, "²"):
            assert message(client.get(f"/thumbnail/{id_}", params={"size": size})).startswith(
                "400 size is not a number"
            )


def test_a_browser_that_has_the_picture_gets_it_only_once(api: TestClient) -> None:
    for path in (f"/thumbnail/{ids(api)['red.png']}", f"/image/{ids(api)['red.png']}"):
        tag = api.get(path).headers["etag"]
        again = api.get(path, headers={"If-None-Match": tag})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert api.get(path, headers={"If-None-Match": '"another"'}).status_code == 200


def test_a_type_that_browsers_do_not_show_becomes_jpeg(storage: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    colour_image("red").save(tmp_path / "in" / "red.tiff")
    index_files(storage, tmp_path / "in")
    with served(storage) as client:
        image = client.get(f"/image/{ids(client)['red.tiff']}")
    assert image.headers["content-type"] == "image/jpeg"
    assert opened(image).size == (24, 16)


def test_a_picture_longer_than_a_jpeg_can_be_is_scaled_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colour_image("red", (66_000, 2)).save(tmp_path / "long.tiff")
    monkeypatch.setattr(Pictures, "payload", lambda *_: {"path": str(tmp_path / "long.tiff")})
    data, media_type = Pictures(None).full("x")  # type: ignore[arg-type]
    assert (media_type, Image.open(io.BytesIO(data)).size) == ("image/jpeg", (JPEG_SIDE, 2))


SECRET = b"-----BEGIN PRIVATE KEY-----"


@pytest.mark.parametrize("change", ["other picture", "no picture", "gone", "pipe", "folder", "link to a secret"])
def test_a_path_that_no_longer_holds_the_picture_is_not_served(
    change: str, api: TestClient, colours: Path, tmp_path: Path
) -> None:
    red, id_ = colours / "red.png", ids(api)["red.png"]
    (tmp_path / "secret").write_bytes(SECRET)
    red.unlink()
    match change:
        case "other picture":
            colour_image("blue", (99, 99)).save(red)
        case "no picture":
            red.write_bytes(SECRET)
        case "pipe":
            os.mkfifo(red)
        case "folder":
            red.mkdir()
        case "link to a secret":
            red.symlink_to(tmp_path / "secret")
    for address in (f"/image/{id_}", f"/thumbnail/{id_}"):
        answer = message(api.get(address))
        assert answer.startswith(f"404 {red}: ")
        assert "PRIVATE" not in answer


def test_a_copy_that_still_holds_the_picture_is_served_instead(storage: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_colours(tmp_path / "in" / folder, "red")
    index_files(storage, tmp_path / "in")
    with served(storage) as client:
        (id_,) = ids(client).values()
        colour_image("blue").save(tmp_path / "in" / "a" / "red.png")
        assert client.get(f"/image/{id_}").content == (tmp_path / "in" / "b" / "red.png").read_bytes()


NO_IDS = ["..%2f..%2fetc%2fpasswd", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "etc/passwd", "%00", "%ff", "-1"]
NO_IDS += ["x" * 9999, "1" * 99, "00000000-0000-0000-0000-000000000000", "12", "{id}"]


def test_an_id_that_no_point_has_is_not_found(api: TestClient) -> None:
    for name in NO_IDS:
        for address in (f"/image/{name}", f"/thumbnail/{name}", f"/{name}"):
            assert message(api.get(address)).startswith("404 "), address


def test_the_stored_thumbnail_is_used_where_the_file_is_out_of_reach_but_no_file_of_another_name(
    colours: Path, storage: dict[str, Any], tmp_path: Path
) -> None:
    index_files(storage, colours, thumbnails=tmp_path / "thumbs")
    with QdrantIndexer(None, **storage) as indexer:
        payloads = dict(indexer.store.scan(None))
        changes = [(id_, old, {**old, "thumbnail": old["path"], "paths": []}) for id_, old in payloads.items()]
        changes = [(id_, old, {**new, "path": "/nowhere.png"}) for id_, old, new in changes if "blue" in old["path"]]
        indexer.store.replace_payloads(changes)
    with served(storage) as client:
        (blue,) = [change[0] for change in changes]
        red = ids(client)["red.png"]
        (colours / "red.png").unlink()
        assert opened(client.get(f"/thumbnail/{red}")).size == (24, 16)
        assert opened(client.get(f"/thumbnail/{red}?size=1000")).size == (24, 16)
        assert message(client.get(f"/image/{red}")).startswith("404 ")
        assert message(client.get(f"/thumbnail/{blue}")) == "404 /nowhere.png: does not exist"


def test_pictures_inside_of_files_are_served(storage: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    colours = write_colours(tmp_path / "out", "red", "green", "blue")
    files = {Path(path).stem: Path(path).read_bytes() for path in colours}
    folder.mkdir()
    (folder / "a.tar").write_bytes(tar([("x/red.png", files["red"]), ("x/red.txt", SECRET)]))
    with zipfile.ZipFile(folder / "b.zip", "w") as archive:
        archive.writestr("green.png", files["green"])
    (folder / "c.parquet").write_bytes(parquet_file([{"image": {"bytes": files["blue"], "path": "blue.png"}}]))
    (folder / "d.pdf").write_bytes(pdf("red", "green", "blue"))
    (folder / "e.mp4").write_bytes(video([0, 80, 160], rate=1))
    index_files(storage, folder, sources=SourceOptions(every=1.0))
    with served(storage) as client:
        by_name = ids(client)
        assert {"a.tar#x/red.png", "b.zip#green.png", "c.parquet#0", "d.pdf#page=2", "e.mp4#t=2.0"} <= by_name.keys()
        for name, colour in {"a.tar#x/red.png": "red", "b.zip#green.png": "green", "c.parquet#0": "blue"}.items():
            assert client.get(f"/image/{by_name[name]}").content == files[colour]
        for name in ("d.pdf#page=2", "e.mp4#t=2.0"):
            assert opened(client.get(f"/thumbnail/{by_name[name]}")).format == "JPEG"
        page = opened(client.get(f"/image/{by_name['d.pdf#page=2']}")).convert("RGB")
        assert page.getpixel((5, 5)) == pytest.approx((0, 128, 0), abs=2)
        (folder / "a.tar").write_bytes(tar([("x/other.png", files["blue"])]))
        (folder / "d.pdf").write_bytes(SECRET)
        gone = message(client.get(f"/image/{by_name['a.tar#x/red.png']}"))
        assert gone.endswith("a.tar#x/red.png: is not an image in the archive")
        assert message(client.get(f"/image/{by_name['d.pdf#page=2']}")).startswith("404 ")


def test_a_picture_on_another_machine_is_not_fetched() -> None:
    for key in ("http://127.0.0.1:1/a.png", "s3://bucket/a.png", "file:///etc/hostname", "colours/red.png"):
        with pytest.raises(CocoaError, match="is not on this machine"):
            read_picture({"path": key})
