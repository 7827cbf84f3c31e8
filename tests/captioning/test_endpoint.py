"""Captions by an endpoint that answers well, slowly, wrongly, twice, and not at all."""

import json
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from chat_endpoint import Asked, ChatEndpoint, Reply, answering, colour, completion
from command_line import Command
from PIL import Image

from cocoa_embed.captioning import endpoint as endpoint_module
from cocoa_embed.captioning.run import JOURNAL
from cocoa_embed.train.data.caption_rows import read_image_folder
from cocoa_embed.train.stages.bridge.collator import split_blocks

COLOURS = ("red", "green", "blue")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in COLOURS:
        Image.new("RGB", (40, 30), "lime" if name == "green" else name).save(folder / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between attempts, which no test waits for; no proxy and no key of this machine."""
    seconds: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", Mock(sleep=seconds.append))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return seconds


def describe(asked: Asked) -> Reply:
    """Describe the image: twice the same, and once in other words."""
    name = colour(asked.image)
    if asked.is_about_questions:
        return completion(f"Q: Which colour is it?\nA: It is {name}.")
    return completion(f"A {name} area." if "query" in asked.prompt else f"All of the image is {name}.")


def words(photos: Path, server: ChatEndpoint, *more: str) -> list[str]:
    out = str(photos.parent / "out")
    return ["caption", str(photos), "--out", out, "--endpoint", server.url, "--model", "m", "--yes", "--json", *more]


def metadata(photos: Path) -> dict[str, dict]:
    lines = (photos.parent / "out" / "metadata.jsonl").read_text().splitlines()
    return {Path(row["file_name"]).stem: row for row in map(json.loads, lines)}


def test_the_output_is_an_image_folder_of_captions_and_of_questions(command: Command, photos: Path) -> None:
    with answering(describe) as server:
        document = command(*words(photos, server)).document()
    assert (document["captioned"], document["captions"], document["questions"]) == (3, 6, 3)
    assert metadata(photos)["red"] == {
        "file_name": "../photos/red.png",
        "text": "All of the image is red.",
        "captions": ["All of the image is red.", "A red area."],
        "questions": [{"question": "Which colour is it?", "answer": "It is red."}],
        "caption_source": f"m ({server.url.split('/')[2]})",
        "caption_prompts": ["detailed", "search"],
    }
    out = photos.parent / "out"
    assert len(read_image_folder(out)) == 3
    assert len(read_image_folder(out, captions="captions")) == 6
    rows = {row.query.image.stem: row for row in read_image_folder(out, captions="questions")}
    assert rows["blue"].query.image.samefile(photos / "blue.png")
    assert [rows["blue"].query.text, rows["blue"].positive.text] == ["Which colour is it?", "It is blue."]
    assert split_blocks(rows["blue"])[1] == "Which colour is it?", "the longer one is not block B"


def test_the_estimate_asks_nothing_and_counts_what_is_then_asked(command: Command, photos: Path) -> None:
    with answering(describe) as server:
        for stopped in (["--dry-run"], []):
            given = [word for word in words(photos, server) if word != "--yes"]
            result = command(*given, *stopped)
            assert not server.asked
            assert not (photos.parent / "out").exists()
        assert "give --yes" in result.error()
        plan = command(*words(photos, server), "--dry-run").document()
        assert (plan["images"], plan["to_caption"], plan["done"]) == (3, 3, 0)
        assert command(*words(photos, server)).status == 0
    assert len(server.asked) == plan["requests"] == 3 * 4
    text = sum(len(asked.prompt) for asked in server.asked) / 4
    assert plan["tokens_in"] == pytest.approx(text + 12 * 40 * 30 / 784, rel=0.05)


def test_an_existing_text_is_kept_unless_it_is_as_short_as_the_name_of_a_class(command: Command, photos: Path) -> None:
    rows = [
        {"file_name": "red.png", "text": "a red image of nothing", "licence": "CC0"},
        {"file_name": "green.png", "text": "golden_retriever", "licence": "CC0"},
        {"file_name": "gone.png", "text": "x"},
    ]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with answering(describe) as server:
        result = command(*words(photos, server))
    assert result.status == 1
    (failure,) = json.loads(result.out)["failed"]
    assert "gone.png" in failure["reason"]
    written = metadata(photos)
    assert written["red"] == {
        "file_name": "../photos/red.png",
        "text": "a red image of nothing",
        "licence": "CC0",
        "caption_source": str(photos / "metadata.jsonl"),
    }
    assert written["green"]["text"] == "All of the image is green."
    assert [written["green"][key] for key in ("replaced_text", "licence")] == ["golden_retriever", "CC0"]
    about = {colour(asked.image): "golden_retriever" in asked.prompt for asked in server.asked}
    assert about == {"green": True, "blue": False}
    assert command(*words(photos, server, "--replace-below", "0", "--dry-run")).document()["kept"] == 2


@pytest.mark.parametrize(
    ("fault", "wait"),
    [
        (Reply("busy", 429, {"Retry-After": "37"}), 37.0),
        (Reply("broken", 500), None),
        (Reply("<html>no JSON</html>"), None),
        (Reply('{"choices": []}'), None),
        (Reply('{"choices": [{"message": {"content": [1]}}]}'), None),
    ],
    ids=["429", "500", "html", "no choices", "no text"],
)
def test_a_passing_fault_is_asked_again_after_as_long_as_the_endpoint_says(
    command: Command, photos: Path, waits: list[float], fault: Reply, wait: float | None
) -> None:
    with answering(lambda asked: fault if asked.number < 2 else describe(asked)) as server:
        document = command(*words(photos, server, "--at-once", "1")).document()
    assert document["captioned"] == 3
    assert len(server.asked) == 12 + 2
    assert len(waits) == 2
    assert wait is None or waits == [wait, wait]


def test_an_image_without_an_answer_is_reported_and_asked_about_by_the_next_run(command: Command, photos: Path) -> None:
    def too_large(asked: Asked) -> Reply:
        return Reply("image too large", 413) if colour(asked.image) == "green" else describe(asked)

    with answering(too_large) as server:
        result = command(*words(photos, server))
        assert result.status == 1
        document = json.loads(result.out)
        assert document["captioned"] == 2
        assert "status 413: 'image too large'" in document["failed"][0]["reason"]
        server.answer = describe
        server.asked.clear()
        assert command(*words(photos, server)).document()["captioned"] == 3
    assert {colour(asked.image) for asked in server.asked} == {"green"}


def test_a_broken_answer_and_half_a_surrogate_in_a_label_cost_no_other_image(command: Command, photos: Path) -> None:
    rows = [{"file_name": "red.png", "text": "caf\ud800"}, {"file_name": "green.png"}, {"file_name": "blue.png"}]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def garble(asked: Asked) -> Reply:
        is_green = colour(asked.image) == "green"
        return Reply("no gzip", headers={"Content-Encoding": "gzip"}) if is_green else describe(asked)

    with answering(garble) as server:
        result = command(*words(photos, server))
    assert result.status == 1
    document = json.loads(result.out)
    assert document["captioned"] == 2
    (failure,) = document["failed"]
    assert "does not answer (Error -3 while decompressing data" in failure["reason"]
    assert {"caf" in asked.prompt for asked in server.asked if colour(asked.image) == "red"} == {True}


def test_a_refused_image_is_listed_by_every_run_and_asked_about_once(command: Command, photos: Path) -> None:
    def refuse(asked: Asked) -> Reply:
        if colour(asked.image) == "blue":
            return completion(None, refusal="not allowed") if asked.is_about_questions else completion("I can't say.")
        return completion("", end="content_filter") if "query" in asked.prompt else describe(asked)

    with answering(refuse) as server:
        for asked in (12, 12):
            result = command(*words(photos, server))
            document = json.loads(result.out)
            assert (result.status, len(server.asked)) == (1, asked)
            assert {Path(each["path"]).stem for each in document["failed"]} == {"blue"}
            assert [each["reason"] for each in document["failed"]][-1] == "questions: refused: 'not allowed'"
            assert {Path(each["path"]).stem for each in document["unusable"]} == {"red", "green"}
    assert set(metadata(photos)) == {"red", "green"}


def test_a_silent_endpoint_ends_the_run_and_what_was_captioned_before_is_kept(
    command: Command, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(endpoint_module, "ATTEMPTS", 2)
    monkeypatch.setattr("cocoa_embed.captioning.run.FAILURES_IN_A_ROW", 2)

    def hang(asked: Asked) -> Reply:
        if colour(asked.image) != "blue":
            time.sleep(0.3)
        return describe(asked)

    with answering(hang) as server:
        message = command(*words(photos, server, "--at-once", "1")).error()
    assert message.startswith("1 2 images in a row have no answer: ")
    assert "does not answer (timed out)" in message
    assert set(metadata(photos)) == {"blue"}


def test_slow_answers_are_waited_for_several_at_a_time(command: Command, photos: Path) -> None:
    running, most = set(), []

    def slowly(asked: Asked) -> Reply:
        running.add(asked.number)
        most.append(len(running))
        time.sleep(0.1)
        running.discard(asked.number)
        return describe(asked)

    with answering(slowly) as server:
        assert command(*words(photos, server, "--at-once", "3")).document()["captioned"] == 3
    assert max(most) == 3


def test_the_key_comes_from_a_variable_and_a_wrong_one_ends_the_run_at_once(
    command: Command, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock(asked: Asked) -> Reply:
        return describe(asked) if asked.authorization == "Bearer secret" else Reply("no", 401)

    with answering(lock) as server:
        given = words(photos, server, "--at-once", "1")
        message = command(*given).error()
        assert "asks for a key (status 401: 'no')" in message
        assert "OPENAI_API_KEY" in message
        assert "MY_KEY is not set" in command(*given, "--key-variable", "MY_KEY").error()
        monkeypatch.setenv("MY_KEY", "wrong")
        assert "refuses the key in MY_KEY" in command(*given, "--key-variable", "MY_KEY").error()
        assert len(server.asked) <= 4  # two runs, an image ahead in each
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        result = command(*given)
        assert result.document()["captioned"] == 3
    assert "secret" not in result.out + result.err + (photos.parent / "out" / JOURNAL).read_text()


def test_an_unknown_model_ends_the_run(command: Command, photos: Path) -> None:
    with answering(lambda asked: Reply('{"error": {"message": "no model m"}}', 404)) as server:
        message = command(*words(photos, server)).error()
    assert "no chat completions of the model 'm' (status 404: " in message
    assert "--endpoint, which often ends in /v1" in message


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1/v1", "http://me:key@127.0.0.1", "http://"])
def test_an_address_of_another_kind_is_refused(command: Command, photos: Path, url: str) -> None:
    result = command("caption", photos, "--out", "out", "--endpoint", url, "--model", "m")
    assert result.status == 2
    assert "is not the address of an endpoint" in result.error()


def test_an_image_is_sent_with_at_most_the_pixels_of_the_limit(command: Command, photos: Path) -> None:
    Image.new("RGB", (400, 300), "red").save(photos / "red.png")
    with answering(describe) as server:
        command(*words(photos, server, "--max-pixels", "2000")).document()
    sizes = {colour(asked.image): asked.image.size for asked in server.asked}
    assert sizes == {"red": (51, 38), "green": (40, 30), "blue": (40, 30)}
