"""A server on loopback: many clients, those that misbehave, and what stays of the index."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from command_line import Command, modules_imported_by
from fake_model import FakeModel, colour_image, write_colours
from fake_qdrant import answer_bytes, fake_server
from served import KEY, index_files, listening, message

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.serve.client import post_search
from cocoa_embed.serve.limits import Limits
from cocoa_embed.serve.run import model_of, open_app


def points(storage: dict[str, Any]) -> list[tuple[str, str, list[float]]]:
    with QdrantIndexer(None, **storage) as indexer:
        found = indexer.store.points(with_vectors=True)
        return sorted((id_, json.dumps(payload), np.asarray(vector).tolist()) for id_, payload, vector, *_ in found)


def test_a_hundred_concurrent_searches_get_what_each_would_get_alone(index: dict[str, Any]) -> None:
    texts = ["red", "green", "blue", "red blue"]
    with (
        listening(index) as url,
        httpx.Client(base_url=url, limits=httpx.Limits(max_connections=100), timeout=60) as client,
    ):
        ask = lambda text: client.post("/search", json={"text": text}).json()["hits"]  # noqa: E731
        alone = {text: ask(text) for text in texts}
        with ThreadPoolExecutor(100) as pool:
            together = list(pool.map(lambda number: ask(texts[number % 4]), range(100)))
    for number, hits in enumerate(together):
        assert [hit["id"] for hit in hits] == [hit["id"] for hit in alone[texts[number % 4]]]
        assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in alone[texts[number % 4]]])


def test_searches_continue_while_another_process_adds_to_a_server_collection(colours: Path, tmp_path: Path) -> None:
    with fake_server() as qdrant:
        storage = {"url": qdrant.url}
        index_files(storage, colours)
        more = tmp_path / "more"
        more.mkdir()
        for number in range(40):
            colour_image("red", (30 + number, 16)).save(more / f"{number}.png")
        counts: list[int] = []
        done = threading.Event()
        with listening(storage) as url, httpx.Client(base_url=url, timeout=60) as client:

            def ask() -> None:
                while not done.is_set():
                    counts.append(len(client.post("/search", json={"text": "red", "limit": 100}).json()["hits"]))

            thread = threading.Thread(target=ask)
            thread.start()
            index_files(storage, more)
            done.set()
            thread.join()
            assert len(client.post("/search", json={"text": "red", "limit": 100}).json()["hits"]) == 44
            assert client.get("/info").json()["points"] == 44
        assert counts == sorted(counts), "a search saw fewer images than one before it"


def test_slow_and_dropped_clients_change_nothing_and_are_let_go(index: dict[str, Any]) -> None:
    before = points(index)
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n"
    with listening(index, seconds=0.5) as url:
        address = (urlsplit(url).hostname, urlsplit(url).port)
        slow = [socket.create_connection(address) for _ in range(20)]
        for connection in slow:
            connection.sendall(head + b'{"text": ')
        for dropped in (
            b"GET / HT",
            head,
            head + b'{"text"',
            b"\x00\xff" * 99,
            head.replace(b"900", b"15") + b'{"text": "red"}',
        ):
            with socket.create_connection(address) as connection:
                connection.sendall(dropped)
        assert httpx.post(f"{url}/search", json={"text": "red"}).status_code == 200
        for connection in slow:
            connection.settimeout(60)
            assert connection.recv(99).startswith(b"HTTP/1.1 408 ")
            connection.close()
        assert httpx.post(f"{url}/search", json={"text": "red"}).status_code == 200
    assert points(index) == before


def test_search_asks_a_server_as_it_would_an_index(
    command: Command, index: dict[str, Any], colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(colours)
    with listening(index) as url:
        red, blue = ("red", "--limit", 2, "--server", url), ("--image", "blue.png", "--server", url, "--json")
        done = command("search", *red)
        assert (done.status, done.out) == (0, "")
        assert f"1.0000  {colours / 'red.png'}  all red" in done.err.splitlines()
        hits = command("search", *blue).document()["hits"]
        assert hits[0].items() >= {"path": str(colours / "blue.png"), "caption": "all blue"}.items()
        near = command("search", "--like", "red.png", "--filter", "shop=b", "--server", url, "--json").document()[
            "hits"
        ]
        assert [Path(hit["path"]).name for hit in near] == ["blue.png"]
        for wrong, words in (
            (["--filter", "widht>3"], "2 " + url + ": nothing was found: no image in"),
            (["--limit", "99999"], "2 " + url + ": limit: "),
            (["--like", "gone.png"], "1 " + url + ": collection 'images' in"),
            (["--image", "gone.png"], "1 gone.png: does not exist"),
            (["--image", "http://127.0.0.1/a.png"], "allowed hosts; allow it with --allow-host 127.0.0.1"),
            (["--model", "x"], "2 --server has its own model and index, and shows hits on its page; leave out --model"),
            (["--html", "x.html"], "leave out --html"),
            (["--collection", "images"], "leave out --collection"),
            (["--exact"], "leave out --exact"),
            (["--hnsw-ef", "64"], "leave out --hnsw-ef"),
            (["--dtype", "float16"], "leave out --dtype"),
        ):
            assert words in command("search", *red, *wrong).error()
    assert f"1 {url} does not answer" in command("search", *red).error()


def test_a_client_names_what_is_wrong_with_the_address_and_sends_the_key(index: dict[str, Any]) -> None:
    with fake_server() as other:
        foreign = {"match": r"is not a server of cocoa-embed \(it answers with status"}
        with pytest.raises(CocoaError, **foreign):
            post_search(other.url, {})
        for answer in (b"{}", b'{"hits": {}}', b"[]", b"<html>"):
            other.fail("/search", answer_bytes(answer))
            with pytest.raises(CocoaError, **foreign):
                post_search(other.url, {})
    for key in ("secret\r", "sécret", "☃"):
        with pytest.raises(UsageError, match="the API key is empty or has characters that no header holds") as error:
            post_search("http://127.0.0.1:1", {}, key)
        assert key not in str(error.value)
    for address in (
        "localhost:8000",
        "ftp://localhost",
        "http://",
        "http://a:b@localhost",
        "http://localhost:x",
        "http://[::1",
    ):
        with pytest.raises(UsageError, match="is not the address of a server"):
            post_search(address, {})


def test_search_server_imports_nothing_heavy(index: dict[str, Any]) -> None:
    with listening(index) as url:
        statement = f"from cocoa_embed.cli.main import main; main(['search', 'red', '--server', {url!r}])"
        done, modules = modules_imported_by(statement)
    assert done.status == 0, done.err
    assert "red.png" in done.err
    heavy = {"numpy", "torch", "transformers", "qdrant_client", "PIL", "starlette", "uvicorn", "httpx"}
    assert not modules & heavy, modules & heavy


def test_the_model_is_the_one_that_made_the_collection(
    index: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sentence_transformers.SentenceTransformer", lambda *_, **__: FakeModel(seed=os.path.exists("other"))
    )
    with (
        QdrantIndexer(None, **index) as indexer,
        pytest.raises(CocoaError, match="was made with fake, which cannot be found"),
    ):
        model_of(indexer.store)
    (tmp_path / "fake").mkdir()
    for name in ("modules.json", "model.safetensors"):
        (tmp_path / "fake" / name).touch()
    indexer, _ = open_app(None, "cpu", index, Limits(), None)
    assert indexer.encoder.name == "fake"
    indexer.encoder.batches.close()  # type: ignore[attr-defined]
    indexer.close()
    (tmp_path / "other").touch()
    with pytest.raises(CocoaError, match=r"was made with fake .* not with fake"):
        open_app("fake", "cpu", index, Limits(), None)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--path", "nowhere"], "1 there is no index in nowhere"),
        (["--host", "0.0.0.0"], "2 --host 0.0.0.0 can be reached from other machines; give --api-key"),
        (["no-model"], "1 no-model: there is no such model folder"),
        (["--api-key", "a b"], "2 the API key is empty or has characters"),
        (["--url", "http://localhost:6333", "--path", "index"], "2 --path and --url were given together"),
    ],
)
def test_wrong_options_of_serve_are_refused_before_anything_is_loaded(
    words: list[str], error: str, command: Command, index: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(index["path"].parent)
    place = [] if {"--path", "--url"} & set(words) else ["--path", "index"]
    assert error in command("serve", *place, *words).error()


SERVE = """
import sys; sys.path[:0] = {path!r}
import sentence_transformers; from fake_model import FakeModel
sentence_transformers.SentenceTransformer = lambda *_, **__: FakeModel()
from cocoa_embed.cli.main import main; main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_the_server_and_changes_nothing(
    stop: signal.Signals, status: int, index: dict[str, Any], tmp_path: Path
) -> None:
    before = points(index)
    write_colours(tmp_path / "fake", "red")
    for name in ("modules.json", "model.safetensors"):
        (tmp_path / "fake" / name).touch()
    code = SERVE.format(path=sys.path)
    words = ["serve", "--path", str(index["path"]), "--port", "0", "--api-key", KEY]
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    lines = iter(process.stderr.readline, "")
    url = next(line.split()[2].rstrip("/") for line in lines if line.startswith("serving at "))
    assert message(httpx.post(f"{url}/search", json={"text": "red"})).startswith("401 ")
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                post_search(url, {"text": "red"}, KEY)
                answered.set()
            except CocoaError:
                return

    answered = threading.Event()
    thread = threading.Thread(target=ask)
    thread.start()
    assert answered.wait(60)
    process.send_signal(stop)
    assert process.wait(60) == status
    done.set()
    thread.join()
    assert "Traceback" not in process.stderr.read()
    assert points(index) == before
