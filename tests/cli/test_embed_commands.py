"""``cocoa-embed embed`` and ``load`` as a stranger runs them; and ``index`` with every kind of source."""

import json
from pathlib import Path

import pytest
from command_line import Command
from fake_model import write_colours
from source_files import pdf, tar
from table_files import png


@pytest.fixture(autouse=True)
def sources(fake_model: None) -> None:
    write_colours(Path("photos"), "red", "green", "blue")
    Path("a.tar").write_bytes(tar([("x.png", png(1)), ("y.png", b"no image")]))
    Path("report.pdf").write_bytes(pdf("red", "blue"))


def test_embed_then_load_then_search(command: Command) -> None:
    done = command("embed", "photos", "a.tar", "--model", "fake", "--out", "out", "--json")
    assert done.status == 1
    document = json.loads(done.out)
    assert (document["parts"], document["skipped"], document["embedded"]) == (2, 0, 4)
    (failure,) = document["failed"]
    assert failure["path"].endswith("a.tar#y.png")
    assert "left out: " in done.err
    again = json.loads(command("embed", "photos", "a.tar", "--model", "fake", "--out", "out", "--json").out)
    assert (again["parts"], again["skipped"], again["failed"]) == (0, 2, document["failed"])
    loaded = command("load", "out", "--json")
    assert (loaded.status, loaded.document()["points"]) == (0, 4)
    hits = command("search", "blue", "--model", "fake", "--limit", 1, "--json").document()["hits"]
    assert [Path(hit["path"]).name for hit in hits] == ["blue.png"]


def test_both_commands_pass_over_the_same_and_say_so(command: Command, caplog: pytest.LogCaptureFixture) -> None:
    write_colours(Path("photos/drafts"), "red")
    Path("a.tar").write_bytes(tar([("x.png", png(1)), ("._x.png", b"\0\5\x16\7\0"), ("drafts/y.png", png(2))]))
    words = ("photos", "a.tar", "--model", "fake", "--exclude", "drafts/", "--exclude", "*.gif", "--json")
    counts = {"excluded": 2, "companion of another file": 1}
    done = command("embed", *words, "--out", "out")
    assert (done.document()["embedded"], done.document()["passed_over"]) == (4, counts)
    assert "passed over: 2 excluded, 1 companion of another file" in done.err
    indexed = command("index", *words).document()
    assert (indexed["indexed"], indexed["passed_over"]) == (4, counts)
    assert caplog.text.count("--exclude *.gif: nothing matches it") == 2


def test_index_takes_archives_documents_and_addresses(command: Command) -> None:
    words = ("index", "photos", "a.tar", "report.pdf", "--model", "fake", "--json")
    summary = json.loads(command(*words).out)
    assert (summary["indexed"], len(summary["failed"])) == (6, 1)
    hits = command("search", "red", "--model", "fake", "--filter", "page=1", "--json").document()["hits"]
    assert [hit["path"].rpartition("/")[2] for hit in hits] == ["report.pdf#page=1"]
    again = json.loads(command(*words).out)
    assert (again["indexed"], again["unchanged"], len(again["failed"])) == (0, 6, 1)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["embed", "photos", "--shard", "0/2"], 2, "--shard 0/2 is not of the form i/n"),
        (["embed", "https://example.com/a.jpg"], 2, "give --allow-host example.com"),
        (["embed", "photos", "--ray", "--devices", "cpu"], 2, "--device and --ray were given together"),
        (["embed", "photos", "--every", "0"], 2, "'--every'"),
    ],
)
def test_wrong_usage_is_reported_in_one_sentence(command: Command, words: list[str], code: int, message: str) -> None:
    done = command(*words, "--model", "fake", "--out", "out")
    assert (done.status, done.out) == (code, "")
    assert message in done.err.replace("\n", " ")
