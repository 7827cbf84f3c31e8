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
from cocoa_embed.cli.output import silence_libraries

Result = tuple[int, str, str]
Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("fake").mkdir()
    for file in ("fake/modules.json", "fake/model.safetensors"):
        Path(file).touch()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    write_colours(folder, "red", "green", "blue")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "red.png", "text": "<script>alert(1)</script>"}))
    return folder


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """The model that the folder ``fake`` is loaded as; a library prints something meanwhile."""
    model = FakeModel()

    def load(*_: object, **__: object) -> FakeModel:
        print("a library says hello")  # noqa: T201
        return model

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", load)
    return model


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exited.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def indexed(command: Command, model: FakeModel, pictures: Path) -> Path:
    assert command("index", pictures, "--model", "fake")[:2] == (0, "")
    return pictures


def message(result: Result, code: int) -> str:
    """Return the error of a command that failed."""
    assert result[:2] == (code, "")
    text = result[2].removeprefix("a library says hello\n")
    assert text.startswith("cocoa-embed: ")
    return text


def found(command: Command, *arguments: object) -> list[str]:
    code, out, _ = command("search", *arguments, "--model", "fake", "--json")
    assert code == 0
    return [Path(hit["path"]).name for hit in json.loads(out)["hits"]]


def test_index_then_search_as_json(command: Command, model: FakeModel, pictures: Path) -> None:
    code, out, err = command("index", pictures, "--model", "fake", "--json")
    assert code == 0
    summary = json.loads(out)
    assert list(summary) == [
        "collection", "indexed", "unchanged", "updated", "replaced", "pruned", "failed", "seconds", "images_per_second"
    ]  # fmt: skip
    assert (summary["indexed"], summary["unchanged"], summary["failed"]) == (3, 0, [])
    assert "hello" in err
    assert "3 indexed, 0 unchanged" in err
    code, out, _ = command("search", "blue", "--model", "fake", "--limit", 2, "--json")
    hits = json.loads(out)["hits"]
    assert [sorted(hit) for hit in hits] == [["id", "path", "payload", "score"]] * 2
    assert (code, hits[0]["path"], hits[0]["payload"]["width"]) == (0, str(pictures / "blue.png"), 24)
    assert hits[0]["score"] > hits[1]["score"]
    assert "_node_content" not in hits[0]["payload"]
    assert len(list(Path("cocoa-index").iterdir())) > 0


def test_changes_are_counted_and_unusable_files_are_named_with_exit_status_1(
    command: Command, model: FakeModel, pictures: Path
) -> None:
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
    assert len(list(Path("small").glob("*.jpg"))) == 2
    code, out, err = command("search", "--image", pictures / "red.png", *storage, "--limit", 1)
    assert (code, out) == (0, "")
    assert err.endswith("red.png  a rose\n")


def test_a_search_is_narrowed_by_filters_threshold_and_limit(
    command: Command, model: FakeModel, pictures: Path
) -> None:
    Image.new("RGB", (100, 50), "red").save(pictures / "wide.png")
    command("index", pictures, "--model", "fake")
    everything = found(command, "red")
    assert found(command, "red", "--filter", "width<100", "--filter", "caption~script") == ["red.png"]
    assert found(command, "red", "--limit", 2) == everything[:2]
    assert set(found(command, "red", "--score-threshold", 0.99)) == {"red.png", "wide.png"}
    uri = "data:image/png;base64," + base64.b64encode((pictures / "blue.png").read_bytes()).decode()
    assert found(command, "--image", uri, "--limit", 1) == found(command, "--image", uri, "--any-orientation")[:1]
    assert found(command, "--image", uri, "--limit", 1) == ["blue.png"]


def test_the_page_shows_copies_thumbnails_and_escaped_texts(command: Command, model: FakeModel, pictures: Path) -> None:
    (pictures / "a copy.png").write_bytes((pictures / "blue.png").read_bytes())
    command("index", pictures, "--model", "fake")
    (pictures / "green.png").unlink()
    (pictures / "a copy.png").unlink()
    query = ("<b>red</b> red", "--image", pictures / "red.png", "--model", "fake")
    code, out, err = command("search", *query, "--html", "found.html", "--json")
    assert (code, len(json.loads(out)["hits"])) == (0, 3)
    assert err.endswith("wrote found.html\n")
    page = Path("found.html").read_text()
    assert "<title>&lt;b&gt;red&lt;/b&gt; red + red.png</title>" in page
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert page.count("cannot be read") == 1
    assert "blue.png" in page
    assert "a copy.png" not in page
    assert "&lt;script&gt;" in page
    assert not any(part in page for part in ("<script", "<b>", "http"))


def test_hits_are_printed_even_if_the_page_cannot_be_written(command: Command, indexed: Path) -> None:
    code, out, err = command("search", "red", "--model", "fake", "--html", indexed, "--json")
    assert (code, len(json.loads(out)["hits"])) == (1, 3)
    assert "pictures cannot be written" in err.splitlines()[-1]


WEB = ["search", "--model", "fake", "--image", "http://127.0.0.1/a.png"]
RED = ["search", "red", "--model", "fake"]
EMPTY = ["index", "empty", "--model", "fake"]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (EMPTY, 1, "there are no images in"),
        (["index", "photoz", "--model", "fake"], 1, "photoz does not exist"),
        ([*RED, "--path", "x"], 1, "there is no index in x; run cocoa-embed index, or change --path"),
        ([*RED, "--edge", "x"], 1, "there is no index in x; run cocoa-embed index, or change --edge"),
        (["search", "  ", "--model", "fake"], 2, "nothing to search for"),
        ([*RED, "--any-orientation"], 2, "--any-orientation needs --image"),
        ([*RED, "--path", "a", "--url", "b"], 2, "--path and --url were given together"),
        ([*EMPTY, "--on-disk"], 2, "need --url or --edge"),
        ([*RED, "--path", "empty", "--image", "gone.png"], 1, "gone.png: does not exist"),
        ([*WEB, "--path", "empty"], 2, "allow its host with --allow-host HOST"),
        ([*WEB, "--path", "empty", "--allow-host", "a.example"], 1, "allowed hosts; allow it with --allow-host HOST"),
        ([*RED[:1], "caf\udce9", *RED[2:], "--path", "empty"], 2, r"'caf\udce9' is not valid Unicode"),
        ([*EMPTY, "--url", "localhost:6333"], 2, "'localhost:6333' is no"),
        ([*RED, "--url", "http://me:secret@host"], 2, "--api-key"),
        ([*RED, "--path", "empty", "--filter", "width>"], 2, "KEY>=VALUE"),
        ([*EMPTY[:3], "missing"], 1, "missing: there is no such model folder"),
    ],
)
def test_wrong_input_is_one_sentence(
    command: Command, model: FakeModel, arguments: list[str], code: int, expected: str
) -> None:
    text = message(command(*arguments), code)
    assert expected in text
    assert text.count("\n") == 1


def test_all_local_faults_are_in_one_message_before_torch_is_imported() -> None:
    index = ["index", "photoz", "empty/x*.png", "--model", "./mdl", "--collection", "a/b"]
    search = [*RED[:2], "--model", "./mdl", "--image", "gone.png", "--filter", "width 1000", "--html", "nodir/x.html"]
    for arguments, status, faults in (
        (["index", "photoz", "--model", "on/hub"], 1, ["photoz does not exist"]),
        (index, 2, ["photoz", "x*.png", "mdl", "a/b"]),
        (["train", "tiny", "data.folder=photoz", "--dry-run"], 1, ["data.folder photoz does not exist"]),
        (search, 2, ["index", "mdl", "=1000", "nodir", "gone"]),
    ):
        code = (
            "import sys\nfrom cocoa_embed.cli.main import main\n"
            f"try: main({arguments!r})\nexcept SystemExit as end: assert end.code == {status}\n"
            "assert not {'torch', 'transformers', 'qdrant_client'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stderr.splitlines()) == len(faults), done.stderr
        assert all(fault in done.stderr for fault in faults), done.stderr


def test_a_query_that_the_model_refuses_is_one_sentence(
    command: Command, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colour_image("red", (1, 20_000)).save("thin.png")
    for query, reason in ((["--image", "thin.png"], "aspect ratio"), ([f"red {IMAGE_TOKEN}"], "image tokens")):
        text = message(command("search", *query, "--model", "fake", "--json"), 1)
        assert "fake does not take the query (" in text
        assert reason in text
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda *_, **__: FakeModel(seed=1))
    for arguments in (("index", indexed), ("search", "red")):
        assert "was made with fake" in message(command(*arguments, "--model", "fake"), 1)


def test_wrong_usage_exits_with_2(command: Command) -> None:
    for arguments in (["index", "--model", "x"], ["search", "x", "--model", "y", "--limit", "0"], ["nonsense"]):
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
    assert "pip install " in message(command("index", pictures, "--model", "fake"), 1)


def test_libraries_show_no_progress_bars() -> None:
    datasets = pytest.importorskip("datasets")
    datasets.enable_progress_bars()
    silence_libraries()
    assert datasets.are_progress_bars_disabled()


def test_the_version_is_one_line(command: Command) -> None:
    assert command("--version") == (0, f"cocoa-embed {cocoa_embed.__version__}\n", "")


def test_help_imports_neither_torch_nor_pillow() -> None:
    code = (
        "import sys\nfrom cocoa_embed.cli.main import main\n"
        "try: main(['index', '--help'])\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'PIL', 'qdrant_client'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--collection" in done.stdout
