"""A folder of another store is named with the option that opens it, and never with advice to empty it."""

from pathlib import Path
from typing import Any

import pytest
from fake_qdrant import SIGNATURE, make_points

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.stores import open_store


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of each kind with one point, a server's storage, a model, photos, and a file; they stay as they are."""
    folder = tmp_path_factory.mktemp("places")
    for location in ("path", "edge"):
        store = open_store(**{location: folder / location}, collection="images")
        store.create(SIGNATURE)
        store.insert(make_points(0, 1))
        store.close()
    for file in (
        "server/raft_state.json",
        "server/collections/images/0/x",
        "model/modules.json",
        "photos/a.png",
        "file",
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


@pytest.mark.parametrize(
    ("option", "place", "advice"),
    [
        ("path", "edge", r"edge is an index that Qdrant Edge made; open it with --edge"),
        ("edge", "path", r"path is an index that Qdrant's local mode made; open it with --path"),
        ("path", "edge/images", r"is one collection .* Qdrant Edge made; give --edge .*/edge --collection images"),
        ("edge", "edge/images", r"is one collection .* Qdrant Edge made; give --edge .*/edge --collection images"),
        ("path", "path/collection/images", r"is one collection .*; give --path .*/path --collection images"),
        ("edge", "path/collection/images", r"is one collection .*; give --path .*/path --collection images"),
        ("path", "path/collection", r"is inside an index; give --path .*/path"),
        *[
            (option, place, "is storage of a Qdrant server; start the server and give its address with --url")
            for option in ("path", "edge")
            for place in ("server", "server/collections", "server/collections/images")
        ],
        ("path", "model", "is a model, not an index; give it as --model"),
        ("edge", "photos", "photos holds something else, not an index .*; give the folder of an index, or the name of"),
        ("path", "photos", "photos holds something else, not an index .*; give the folder of an index, or the name of"),
        ("edge", "file", "file is a file; give the folder of an index"),
        ("path", "file", "file is a file; give the folder of an index"),
    ],
)
def test_a_folder_of_another_store_is_named_and_left_alone(places: Path, option: str, place: str, advice: str) -> None:
    before = sorted(places.rglob("*"))
    location: dict[str, Any] = {option: places / place}
    for use in ("signature", "require_signature", "count"):
        store = open_store(**location, collection="images")
        with pytest.raises(CocoaError, match=advice) as raised:
            getattr(store, use)()
        assert "empty" not in str(raised.value)
    with pytest.raises(CocoaError, match=advice):
        open_store(**location, collection="images").create(SIGNATURE)
    assert sorted(places.rglob("*")) == before


def test_a_collection_that_is_not_there_is_named_with_the_nearest(places: Path) -> None:
    for option in ("path", "edge"):
        location: dict[str, Any] = {option: places / option}
        with pytest.raises(CocoaError, match=r"no collection 'image' in .* \(did you mean 'images'\? known: images\)"):
            open_store(**location, collection="image").require_signature()
