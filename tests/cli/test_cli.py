import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_model import IMAGE_TOKEN, FakeModel, colour_image, write_colours
from PIL import Image

pytest.importorskip("qdrant_client")

import cocoa_embed
from cocoa_embed.cli import main as cli
from cocoa_embed.model import loading

Result = tuple[int, str, str]
Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    write_colours(folder, "red", "green", "blue")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "red.png", "text": "<script>alert(1)</script>"}))
    return folder


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    model = FakeModel()
    monkeypatch.setattr(loading, "load_model", lambda name, device: model)
    return model


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def sentence(result: Result) -> str:
    """Return the one line on standard error of a command that failed."""
    code, out, err = result
    assert code in (1, 2)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("cocoa-embed: ")
    return line


def test_index_then_search_as_json(command: Command, model: FakeModel, pictures: Path) -> None:
    code, out, err = command("index", pictures, "--model", "fake", "--json")
    assert code == 0
    summary = json.loads(out)
    assert list(summary) == [
        "collection", "indexed", "unchanged", "updated", "replaced", "pruned", "failed", "seconds", "images_per_second"
    ]  # fmt: skip
    assert (summary["indexed"], summary["unchanged"], summary["updated"], summary["failed"]) == (3, 0, 0, [])
    assert "3 indexed, 0 unchanged, 0 updated, 0 replaced, 0 pruned, 0 left out" in err
    assert Path("cocoa-index").is_dir()

    code, out, err = command("search", "blue", "--model", "fake", "--limit", 2, "--json")
    hits = json.loads(out)["hits"]
    assert code == 0
    assert [sorted(hit) for hit in hits] == [["id", "path", "payload", "score"]] * 2
    assert hits[0]["path"] == str(pictures / "blue.png")
    assert hits[0]["score"] > hits[1]["score"]
    assert "_node_content" not in hits[0]["payload"]
    assert hits[0]["payload"]["width"] == 24


def test_a_new_caption_is_counted_as_updated_and_found(command: Command, model: FakeModel, pictures: Path) -> None:
    command("index", pictures, "--model", "fake")
    (pictures / "metadata.jsonl").write_text(json.dumps({"file_name": "red.png", "text": "a rose"}))
    code, out, err = command("index", pictures, "--model", "fake", "--json")
    summary = json.loads(out)
    assert code == 0
    assert (summary["indexed"], summary["unchanged"], summary["updated"], summary["failed"]) == (0, 2, 1, [])
    assert "0 indexed, 2 unchanged, 1 updated" in err
    _, _, err = command("search", "red", "--model", "fake", "--limit", 1)
    assert err.endswith("red.png  a rose\n")


def test_without_json_standard_output_is_empty(command: Command, model: FakeModel, pictures: Path) -> None:
    code, out, _ = command("index", pictures, "--model", "fake", "--path", "store", "--collection", "c")
    assert (code, out) == (0, "")
    code, out, err = command("search", "--image", pictures / "green.png", "--model", "fake", "--path", "store",
                             "--collection", "c")  # fmt: skip
    assert (code, out) == (0, "")
    assert str(pictures / "green.png") in err.splitlines()[0]


def test_what_others_print_does_not_reach_standard_output(
    command: Command, model: FakeModel, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(name: str, device: str | None) -> FakeModel:
        print("a library says hello")  # noqa: T201
        return model

    monkeypatch.setattr(loading, "load_model", chatty)
    _, out, err = command("index", pictures, "--model", "fake", "--json")
    assert json.loads(out)["indexed"] == 3
    assert "hello" in err


def test_a_file_left_out_is_named_and_the_exit_status_is_1(command: Command, model: FakeModel, pictures: Path) -> None:
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    code, out, err = command("index", pictures, "--model", "fake", "--json")
    assert code == 1
    (failure,) = json.loads(out)["failed"]
    assert failure["path"] == str(pictures / "broken.jpg")
    assert "left out: " in err
    assert "broken.jpg" in err
    assert json.loads(out)["indexed"] == 3
    assert command("index", pictures / "red.png", "--model", "fake")[0] == 0


def test_the_gallery_shows_thumbnails_and_escapes_captions(command: Command, model: FakeModel, pictures: Path) -> None:
    command("index", pictures, "--model", "fake")
    (pictures / "green.png").unlink()
    code, out, err = command("search", "<b>red</b> red", "--model", "fake", "--html", "found.html")
    assert (code, out) == (0, "")
    assert "wrote found.html" in err
    page = Path("found.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert "cannot be read any more" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<b>" not in page
    assert "http" not in page


def test_a_gallery_that_cannot_be_written_is_one_sentence(command: Command, model: FakeModel, pictures: Path) -> None:
    command("index", pictures, "--model", "fake")
    result = command("search", "red", "--model", "fake", "--html", "no/such/folder.html", "--json")
    assert "no/such/folder.html cannot be written" in sentence(result)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["index", "empty", "--model", "fake"], 1, "there are no images in"),
        (["index", "missing", "--model", "fake"], 1, "missing does not exist"),
        (["search", "red", "--model", "fake"], 1, "there is no index in cocoa-index"),
        (["search", "--model", "fake"], 2, "nothing to search for"),
        (["search", "red", "--model", "fake", "--path", "a", "--url", "b"], 2, "--path and --url were given together"),
        (["search", "--image", "gone.png", "--model", "fake"], 1, "gone.png: does not exist"),
        (["search", "caf\udce9", "--model", "fake"], 2, r"'caf\udce9' is not valid Unicode"),
        (["index", "empty", "--model", "fake", "--collection", "a/b"], 2, "'a/b' is no name for a collection"),
        (["search", "red", "--model", "fake", "--collection", ""], 2, "'' is no name for a collection"),
        (["index", "empty", "--model", "fake", "--url", "localhost:6333"], 2, "'localhost:6333' is no address of"),
        (["search", "red", "--model", "fake", "--url", "http://localhost:port"], 2, "is no address of"),
    ],
)
def test_wrong_input_is_one_sentence(
    command: Command, model: FakeModel, arguments: list[str], code: int, message: str
) -> None:
    Path("empty").mkdir()
    result = command(*arguments)
    assert message in sentence(result)
    assert result[0] == code


def test_a_query_that_the_model_refuses_is_one_sentence(command: Command, model: FakeModel, pictures: Path) -> None:
    command("index", pictures, "--model", "fake")
    colour_image("red", (1, 20_000)).save("thin.png")
    for query, reason in ((["--image", "thin.png"], "aspect ratio"), ([f"red {IMAGE_TOKEN}"], "image tokens")):
        result = command("search", *query, "--model", "fake", "--json")
        line = sentence(result)
        assert result[0] == 1
        assert line.startswith("cocoa-embed: fake does not take the query (")
        assert reason in line


def test_a_collection_of_another_model_is_one_sentence(
    command: Command, model: FakeModel, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("index", pictures, "--model", "fake")
    monkeypatch.setattr(loading, "load_model", lambda name, device: FakeModel(seed=1))
    for arguments in (("index", pictures), ("search", "red")):
        line = sentence(command(*arguments, "--model", "other"))
        assert "was made with fake" in line
        assert "not with other" in line


def test_a_model_that_cannot_be_used_is_one_sentence(command: Command, pictures: Path) -> None:
    Path("words").mkdir()
    Path("bare").mkdir()
    Path("bare/modules.json").write_text("[]")
    Path("broken").mkdir()
    Path("broken/modules.json").write_text("{")
    Path("broken/model.safetensors").touch()
    Path("file").touch()
    for model, message in {
        "missing": "missing: there is no such model folder",
        "./missing": "./missing: there is no such model folder",
        "words": "words is no SentenceTransformer (it has no modules.json)",
        "bare": "bare has no weights",
        "broken": "broken cannot be loaded",
        "file": "file is a file",
    }.items():
        result = command("index", pictures, "--model", model)
        assert message in sentence(result)
        assert result[0] == 1


@pytest.mark.parametrize(
    "arguments",
    [["index", "--model", "x"], ["index", "x"], ["search", "x", "--model", "y", "--limit", "0"], ["nonsense"]],
)
def test_wrong_usage_exits_with_2(command: Command, arguments: list[str]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err
    assert "Traceback" not in err


def test_a_missing_extra_is_named_with_the_command(
    command: Command, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "qdrant_client"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    line = sentence(command("index", pictures, "--model", "fake"))
    assert "pip install 'cocoa-embed[qdrant]'" in line


def test_the_version_is_one_line(command: Command) -> None:
    assert command("--version") == (0, f"cocoa-embed {cocoa_embed.__version__}\n", "")


def test_help_is_quick_it_imports_neither_torch_nor_pillow() -> None:
    code = (
        "import sys\nfrom cocoa_embed.cli.main import main\n"
        "try: main(['index', '--help'])\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'PIL', 'qdrant_client'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--collection" in done.stdout


def test_a_search_is_narrowed_by_filters_threshold_limit_and_offset(
    command: Command, model: FakeModel, pictures: Path
) -> None:
    Image.new("RGB", (100, 50), "red").save(pictures / "wide.png")
    command("index", pictures, "--model", "fake")

    def found(*options: object) -> list[str]:
        code, out, _ = command("search", "red", "--model", "fake", "--json", *options)
        assert code == 0
        return [Path(hit["path"]).name for hit in json.loads(out)["hits"]]

    everything = found()
    assert len(everything) == 4
    assert found("--filter", "width>=100") == ["wide.png"]
    assert found("--filter", "width<100", "--filter", "caption~script") == ["red.png"]
    assert found("--limit", 2) == everything[:2]
    assert found("--limit", 2, "--offset", 2) == everything[2:]
    assert set(found("--score-threshold", 0.99)) == {"red.png", "wide.png"}
    assert "KEY>=VALUE" in sentence(command("search", "red", "--model", "fake", "--filter", "width>"))


def test_a_query_image_may_be_a_data_address_and_comes_from_allowed_hosts_alone(
    command: Command, model: FakeModel, pictures: Path
) -> None:
    command("index", pictures, "--model", "fake")
    address = "data:image/png;base64," + base64.b64encode((pictures / "blue.png").read_bytes()).decode()
    code, out, _ = command("search", "--image", address, "--model", "fake", "--limit", 1, "--json")
    assert (code, Path(json.loads(out)["hits"][0]["path"]).name) == (0, "blue.png")
    for options in ((), ("--allow-host", "other.example")):
        line = sentence(command("search", "--image", "http://127.0.0.1/a.png", "--model", "fake", *options))
        assert "127.0.0.1" in line


def test_a_gallery_is_titled_by_what_was_asked(command: Command, model: FakeModel, pictures: Path) -> None:
    command("index", pictures, "--model", "fake")
    command("search", "red", "--image", pictures / "blue.png", "--model", "fake", "--html", "hits.html")
    assert "<title>red + blue.png</title>" in Path("hits.html").read_text()


def test_pruning_and_thumbnails_are_options(command: Command, model: FakeModel, pictures: Path) -> None:
    command("index", pictures, "--model", "fake", "--thumbnails", "small")
    assert len(list(Path("small").glob("*.jpg"))) == 3
    (pictures / "metadata.jsonl").unlink()
    (pictures / "red.png").unlink()
    _, out, _ = command("index", pictures, "--model", "fake", "--prune", "--thumbnails", "small", "--json")
    assert json.loads(out)["pruned"] == 1
    assert len(list(Path("small").glob("*.jpg"))) == 2


def test_a_blank_text_is_nothing_to_search_for(command: Command, model: FakeModel, pictures: Path) -> None:
    command("index", pictures, "--model", "fake")
    assert "nothing to search for" in sentence(command("search", "  ", "--model", "fake"))
