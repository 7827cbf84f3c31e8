import base64
import json
import sys
from io import BytesIO
from pathlib import Path
from unittest.mock import Mock

import pytest
from command_line import Command
from fake_model import IMAGE_TOKEN, FakeModel, colour_image, write_colours
from PIL import Image
from source_files import parquet_file, pdf, tar

pytest.importorskip("qdrant_client")
pytestmark = pytest.mark.usefixtures("fake_model")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    write_colours(folder, "red", "green", "blue")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "red.png", "text": "<script>alert(1)</script>"}))
    return folder


@pytest.fixture
def indexed(command: Command, pictures: Path) -> Path:
    assert command("index", pictures, "--model", "fake")[:2] == (0, "")
    return pictures


def png_of(colour: str) -> bytes:
    colour_image(colour).save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


def found(command: Command, *arguments: object) -> list[str]:
    hits = command("search", *arguments, "--model", "fake", "--json").document()["hits"]
    return [Path(hit["path"]).name for hit in hits]


def test_index_then_search_as_json(command: Command, pictures: Path) -> None:
    done = command("index", pictures, "--model", "fake", "--json")
    summary = done.document()
    assert list(summary) == [
        "collection", "indexed", "unchanged", "updated", "replaced", "pruned", "failed", "passed_over",
        "seconds", "images_per_second"
    ]  # fmt: skip
    assert (summary["indexed"], summary["unchanged"], summary["failed"]) == (3, 0, [])
    assert "hello" in done.err
    assert "3 indexed, 0 unchanged" in done.err
    first, second = command("search", "blue", "--model", "fake", "--limit", 2, "--json").document()["hits"]
    assert sorted(first) == sorted(second) == ["id", "path", "payload", "score"]
    assert (first["path"], first["payload"]["width"]) == (str(pictures / "blue.png"), 24)
    assert first["score"] > second["score"]
    assert "_node_content" not in first["payload"]
    assert any(Path("cocoa-index").iterdir())


def test_changes_are_counted_and_unusable_files_are_named_with_exit_status_1(command: Command, pictures: Path) -> None:
    storage = ("--path", "store", "--collection", "c", "--model", "fake")
    assert command("index", pictures, *storage, "--thumbnails", "small")[:2] == (0, "")
    (pictures / "metadata.jsonl").write_text(json.dumps({"file_name": "red.png", "text": "a rose"}))
    (pictures / "green.png").unlink()
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    code, out, err = command("index", pictures, *storage, "--thumbnails", "small", "--prune", "--json")
    summary = json.loads(out)
    (failure,) = summary["failed"]
    assert (code, failure["path"]) == (1, str(pictures / "broken.jpg"))
    assert "broken.jpg" in err
    assert [summary[key] for key in ("indexed", "unchanged", "updated", "pruned")] == [0, 1, 1, 1]
    assert len(list(Path("small").glob("*/*.jpg"))) == 2
    code, out, err = command("search", "--image", pictures / "red.png", *storage, "--limit", 1)
    assert (code, out, err.endswith("red.png  a rose\n")) == (0, "", True)


def test_an_empty_folder_is_not_pruned_and_images_are_forgotten_by_name(command: Command, indexed: Path) -> None:
    for file in indexed.iterdir():
        file.unlink()
    code, _, err = command("index", indexed, "--model", "fake", "--prune")
    assert (code, err.count("is a disk missing? To prune, use --prune-all")) == (1, 1)
    done = command("forget", indexed / "red.png", "pictures/green.png", "--json")
    assert (done.status, done.document()["deleted"]) == (0, 2)
    assert done.document()["forgotten"] == {str(indexed / "red.png"): 1, "pictures/green.png": 1}
    code, _, err = command("forget", indexed, "elsewhere")
    assert (code, err) == (1, f"{indexed}: 1 images forgotten\nelsewhere: not indexed\n")
    assert found(command, "red") == []
    for wrong, status, words in (
        (["forget"], 2, "Missing argument"),
        (["forget", "x", "--path", "nowhere"], 1, "there is no index in nowhere"),
        (["forget", "x", "--collection", "other"], 1, "no collection 'other'"),
        (["forget", "x", "--path", "a", "--edge", "b"], 2, "given together"),
    ):
        code, _, err = command(*wrong)
        assert code == status
        assert words in err


def test_what_is_passed_over_is_counted_with_exit_status_0(
    command: Command, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "._red.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    write_colours(pictures / "@eaDir" / "red.png", "yellow")
    write_colours(pictures / "drafts", "yellow")
    words = ("index", pictures, "--model", "fake", "--exclude", "drafts/", "--exclude", "*.GIF", "--json")
    code, out, err = command(*words)
    summary = json.loads(out)
    assert (code, summary["indexed"], summary["failed"]) == (0, 3, [])
    assert summary["passed_over"] == {"companion of another file": 1, "system folder": 1, "excluded": 1}
    (line,) = (line for line in err.splitlines() if line.startswith("passed over: "))
    parts = line.removeprefix("passed over: ").split(", ")
    assert sorted(parts) == ["1 companion of another file", "1 excluded", "1 system folder"]
    assert "--exclude *.GIF: nothing matches it" in caplog.text
    assert command("index", pictures, pictures / "@eaDir", "--model", "fake", "--json").document()["indexed"] == 1
    (pictures / "only").mkdir()
    (pictures / "._red.png").rename(pictures / "only" / "._red.png")
    code, _, err = command("index", pictures / "only", "--model", "fake")
    assert (code, "there are no images in" in err, "except for 1 passed over" in err) == (1, True, True)
    assert command("index", pictures, "--model", "fake", "--exclude", "!").status == 2


def test_a_search_is_narrowed_by_filters_threshold_and_limit(command: Command, indexed: Path) -> None:
    Image.new("RGB", (100, 50), "red").save(indexed / "wide.png")
    command("index", indexed, "--model", "fake")
    everything = found(command, "red")
    assert found(command, "red", "--filter", "width<100", "--filter", "caption~script") == ["red.png"]
    assert found(command, "red", "--limit", 2) == everything[:2]
    assert set(found(command, "red", "--score-threshold", 0.99)) == {"red.png", "wide.png"}
    uri = "data:image/png;base64," + base64.b64encode((indexed / "blue.png").read_bytes()).decode()
    assert found(command, "--image", uri, "--limit", 1) == ["blue.png"]
    assert found(command, "--image", uri, "--any-orientation")[0] == "blue.png"


def test_the_page_shows_copies_thumbnails_and_escaped_texts(command: Command, pictures: Path) -> None:
    (pictures / "a copy.png").write_bytes((pictures / "blue.png").read_bytes())
    command("index", pictures, "--model", "fake")
    (pictures / "green.png").unlink()
    (pictures / "a copy.png").unlink()
    query = ("search", "<b>red</b> red", "--image", pictures / "red.png", "--model", "fake", "--json", "--html")
    done = command(*query, "found.html")
    assert len(done.document()["hits"]) == 3
    assert done.err.endswith("wrote found.html\n")
    page = Path("found.html").read_text()
    assert "<title>&lt;b&gt;red&lt;/b&gt; red + red.png</title>" in page
    assert page.count('src="data:image/jpeg;base64,') == 3, "the query, and two hits"
    assert page.index('alt="The query image"') < page.index("<main>")
    assert page.index('<strong class="caption">&lt;script&gt;') < page.index("/<wbr>red.png"), (
        "the caption before the path"
    )
    assert page.count("cannot be read") == 1
    assert "blue.png" in page
    assert "&lt;script&gt;" in page
    assert not any(part in page for part in ("a copy.png", "<script", "<b>", "http:", "https:"))
    code, out, err = command(*query, pictures)
    assert (code, len(json.loads(out)["hits"])) == (1, 3), "hits are printed even if the page cannot be written"
    assert "pictures cannot be written" in err.splitlines()[-1]


RED = ["search", "red", "--model", "fake"]
BESIDE_AN_INDEX = [*RED, "--path", "empty"]
FROM_THE_WEB = [*BESIDE_AN_INDEX, "--image", "http://127.0.0.1/a.png"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["search", "  ", "--model", "fake"], "2 nothing to search for"),
        ([*RED, "--path", "a", "--url", "b"], "2 --path and --url were given together"),
        (["load", "x", "--create", "shard=4"], "2 there is no creation option 'shard' (did you mean 'shards'? known: "),
        (["load", "x", "--prefer-grpc"], "2 a local store (path) has no prefer_grpc"),
        (
            [*FROM_THE_WEB, "--allow-host", "a.example"],
            "is on 127.0.0.1, which is not among the allowed hosts; allow it with --allow-host 127.0.0.1",
        ),
        (
            [*BESIDE_AN_INDEX, "--image", "nonsense://bucket/a.png"],
            "1 nonsense://bucket/a.png: cannot be read (Protocol not known: nonsense",
        ),
        ([*BESIDE_AN_INDEX, "--image", "file:///gone%20now.png"], "1 /gone now.png: does not exist"),
        ([*BESIDE_AN_INDEX, "--limit", str(2**64)], "2 limit is 18446744073709551616 and offset 0; "),
        ([*BESIDE_AN_INDEX, "--score-threshold", "nan"], "2 score_threshold is nan; give a cosine"),
        (["search", "caf\udce9", *BESIDE_AN_INDEX[2:]], r"'caf\udce9' is not valid Unicode"),
        ([*RED, "--url", "http://me:secret@host"], "--api-key"),
    ],
)
def test_wrong_input_is_reported_in_one_sentence(command: Command, arguments: list[str], expected: str) -> None:
    Path("empty").mkdir()
    done = command(*arguments)
    assert expected in done.error()
    assert set(done.err.splitlines()[:-1]) <= {"a library says hello"}


def test_a_query_that_does_not_fit_the_model_is_reported_in_one_sentence(command: Command, indexed: Path) -> None:
    colour_image("red", (1, 20_000)).save("thin.png")
    for query, reason in ((["--image", "thin.png"], "aspect ratio"), ([f"red {IMAGE_TOKEN}"], "image tokens")):
        text = command("search", *query, "--model", "fake", "--json").error()
        assert "fake does not accept the query (" in text
        assert reason in text


def test_wrong_usage_exits_with_2(command: Command) -> None:
    for words in ("index --model x", "search x --model y --limit 0", "eval mmeb x --model m", "no"):
        code, out, err = command(*words.split())
        assert (code, out, "Error: " in err, "Traceback" in err) == (2, "", True, False)


def test_a_missing_extra_is_named_with_the_command(
    command: Command, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "qdrant_client"]:
        monkeypatch.delitem(sys.modules, name)
    for module in ("qdrant_client", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "[qdrant]'" in command("index", pictures, "--model", "fake").error()
    (pictures / "MSCOCO_i2t").mkdir()
    (pictures / "MSCOCO_i2t" / "test-00000-of-00001.parquet").touch()
    assert "[eval]'" in command("eval", "mmeb", pictures, "--images", pictures, "--model", "fake").error()


def test_ctrl_c_while_a_model_is_loaded_is_reported(
    command: Command, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", interrupt)
    write_colours(indexed, "yellow")
    for words in (["search", "red"], ["index", indexed]):
        done = command(*words, "--model", "fake")
        assert (done.status, done.out, done.err.splitlines()[-1]) == (130, "", "cocoa-embed: interrupted")


def test_images_inside_of_other_files_are_shown_and_searched_by(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.tar").write_bytes(tar([(f"{name}.png", png_of(name)) for name in ("red", "green")]))
    (folder / "rows.parquet").write_bytes(parquet_file([{"image": png_of("yellow")}]))
    (folder / "report.pdf").write_bytes(pdf("white", "blue"))
    assert command("index", folder, "--model", "fake").status == 0
    for key in ("a.tar#green.png", "rows.parquet#0", "report.pdf#page=2"):
        assert found(command, "--image", f"shards/{key}", "--limit", 1) == [key]
        page = command("search", "--like", folder / key, "--json", "--html", f"{key}.html").document()
        assert len(page["hits"]) == 4
        text = Path(f"{key}.html").read_text()
        assert text.count('src="data:image/jpeg;base64,') == 5, "the example, and the hits"
        assert "cannot be read" not in text
    assert "a.tar#gone.png: is not an image in the archive" in command(
        "search", "--image", "shards/a.tar#gone.png", "--model", "fake"
    ).error()  # fmt: skip


def test_a_search_loads_the_model_with_the_given_options(
    command: Command, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Mock(return_value=FakeModel())
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", loaded)
    assert "v1 needs a model on the hub" in command("search", "red", "--model", "fake", "--revision", "v1").error()
    given = ("--dtype", "bfloat16", "--trust-remote-code")
    assert command("search", "red", "--model", "fake", *given).status == 0
    (call,) = loaded.call_args_list
    assert call.kwargs["trust_remote_code"]
    assert "bfloat16" in str(call.kwargs["model_kwargs"])
    assert command("search", "--like", indexed / "red.png").status == 0, "an example needs no model"
