"""The commands about a collection, which load no model, and searches by indexed images."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from command_line import Command, modules_of_command
from fake_model import FakeModel, write_colours
from fake_qdrant import SIGNATURE, fake_server, make_points

from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.integrations.qdrant.searching import export
from cocoa_embed.integrations.qdrant.stores import open_store


@pytest.fixture(params=["--path", "--edge"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of an index of four colours, with a caption and an author."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    files = write_colours(folder, "red", "green", "blue", "yellow")
    rows = [{"file_name": Path(file).name, "text": f"it is {n}", "author": "ab"[n % 2]} for n, file in enumerate(files)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    location: dict[str, Any] = {request.param.removeprefix("--"): "index"}
    with QdrantIndexer(FakeModel(), **location) as indexer:
        indexer.index(folder, progress=False)
    return [request.param, "index"]


def test_an_indexed_image_finds_others_without_a_model(command: Command, storage: list[str]) -> None:
    def found(*arguments: object) -> list[str]:
        hits = command("search", *arguments, *storage, "--json").document()["hits"]
        return [Path(hit["path"]).name for hit in hits]

    everything = found("--like", "pictures/red.png")
    assert sorted(everything) == ["blue.png", "green.png", "yellow.png"]
    first = f"pictures/{everything[0]}"
    assert set(found("--like", "pictures/red.png", "--unlike", first)) == {*everything[1:]}
    assert found("--like", "pictures/red.png", "--filter", "author=b", "--limit", 1)[0] in ("green.png", "yellow.png")
    assert found("--like", "pictures/red.png", "--diversity", 0, "--limit", 2) == everything[:2]
    assert len(found("--like", "pictures/red.png", "--group-by", "author")) == 2
    page = command("search", "--like", "pictures/red.png", *storage, "--html", "page.html")
    text = Path("page.html").read_text()
    assert (page.status, "<title>like red.png</title>" in text, "The query image" in text) == (0, True, True)
    for query, words in (
        (["--like", "pictures/none.png"], "1 collection 'images' in index has no image pictures/none.png"),
        (["red"], "2 a text or an image needs the model of the collection; give it as --model"),
        (["--unlike", "pictures/red.png"], "2 nothing to search for; give a text, --image FILE, --like PATH"),
    ):
        assert words in command("search", *query, *storage).error()


def test_info_and_list_name_model_size_and_keys(command: Command, storage: list[str]) -> None:
    document = command("info", *storage, "--json").document()
    assert (document["collection"], document["points"], document["dimension"]) == ("images", 4, 48)
    assert {"author", "caption", "width"} <= set(document["keys"])
    assert document["fingerprint"][:12] in command("info", *storage).err
    location: dict[str, Any] = {storage[0].removeprefix("--"): "index"}
    store = open_store(**location, collection="other")
    store.create(SIGNATURE)
    store.insert(make_points(0, 2))
    store.close()
    listed = command("list", *storage, "--json").document()["collections"]
    assert [(each["collection"], each["points"], each["dimension"]) for each in listed] == [
        ("images", 4, 48),
        ("other", 2, 8),
    ]
    assert "other: 2 points, 8 dimensions, m\n" in command("list", *storage).err
    assert "no collection 'imges' in index (did you mean 'images'? known: images, other)" in (
        command("info", *storage, "--collection", "imges").error()
    )


def test_points_are_exported_as_json_lines_and_parquet(command: Command, storage: list[str]) -> None:
    done = command("export-points", "points.jsonl", "--vectors", *storage)
    assert "4 points of collection 'images' in index written to points.jsonl" in done.err
    rows = [json.loads(line) for line in Path("points.jsonl").read_text().splitlines()]
    assert {(row["payload"]["caption"], len(row["vector"])) for row in rows} == {(f"it is {n}", 48) for n in range(4)}
    assert "_node_content" not in rows[0]["payload"]
    command("export-points", "points.parquet", "--vectors", *storage)
    table = pyarrow.parquet.read_table("points.parquet").to_pylist()
    assert {row.pop("caption_vector") for row in table} == {None}
    assert [{**row, "payload": json.loads(row["payload"])} for row in table] == rows
    out = command("export-points", "-", "--filter", "author=a", *storage).out
    assert [json.loads(line)["payload"]["metadata"] for line in out.splitlines()] == [{"author": "a"}] * 2
    command("export-points", "none.parquet", "--filter", "width>9999", *storage)
    assert pyarrow.parquet.read_table("none.parquet").num_rows == 0
    assert not list(Path().glob("*.new"))
    for arguments, words in (
        (["points.csv"], "2 points.csv is not a file for points; give one that ends in .jsonl or .parquet, or -"),
        (["none/points.jsonl"], "1 none/points.jsonl cannot be written: its folder does not exist"),
        (["a.jsonl", "--filter", "width 5"], "2 'width 5' is not a filter: did you mean width=5?"),
    ):
        assert words in command("export-points", *arguments, *storage).error()


def test_an_export_that_fails_leaves_the_earlier_file(
    command: Command, storage: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("points.jsonl").write_text("earlier")
    monkeypatch.setattr(export, "plain_payload", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("export-points", "points.jsonl", *storage)
    assert [file.read_text() for file in Path().glob("points*")] == ["earlier"]


def test_an_export_that_cannot_be_written_is_reported_in_one_sentence(command: Command, storage: list[str]) -> None:
    long = f"{'a' * 245}.jsonl"  # the name of its scratch file is longer
    assert f"{long} cannot be written (File name too long)" in command("export-points", long, *storage).error()


def test_a_column_becomes_filterable_on_a_server(command: Command) -> None:
    with fake_server() as server:
        server.is_strict = True
        store = open_store(url=server.url, collection="images")
        store.create(SIGNATURE)
        store.insert(make_points(0, 3, metadata={"licence": "CC0", "year": 1900}, path="/a.png"))
        search = ("search", "--like", "/a.png", "--filter", "licence=CC0", "--url", server.url)
        assert "run: cocoa-embed filterable licence --url URL --collection images" in command(*search).error()
        done = command("filterable", "licence", "year", "--url", server.url)
        assert "keyword index on metadata.licence" in done.err
        assert "integer index on metadata.year" in done.err
        assert len(command(*search, "--json").document()["hits"]) == 2
        assert "filters work only on: bytes, caption" in command("info", "--url", server.url).err
        assert "licence=CC0" not in command("export-points", "-", "--filter", "licence=CC0", "--url", server.url).err
        store.close()
    assert "2 a local index (--path) filters by any key" in command("filterable", "licence").error()


def test_no_heavy_library_is_loaded(storage: list[str], tmp_path: Path) -> None:
    result, modules = modules_of_command(["info", *storage], tmp_path)
    assert result.status == 0, result.err
    assert not {"torch", "transformers", "sentence_transformers"} & modules
