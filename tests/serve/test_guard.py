"""Who may ask, how much at once, and how large a request may be."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_model import FakeModel
from served import KEY, message, served

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.serve.address import bind, check_address

JSON = {"content-type": "application/json"}


def test_only_the_right_key_opens(index: dict[str, Any]) -> None:
    paths = {"/info": "GET", "/search": "POST", "/image/x": "GET", "/v1/models": "GET", "/x": "GET"}
    with served(index, api_key=KEY) as client:
        for given in (None, "Bearer", "Bearer wrong", KEY, f"Bearer {KEY} ", f"Basic {KEY}", "Bearer é"):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            for path, method in paths.items():
                answer = client.request(method, path, headers=headers)
                assert message(answer).startswith("401 send the server's API key"), (given, path)
                assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/health", headers=headers).status_code == 200
        right = {"Authorization": f"Bearer {KEY}", "Host": "photos.example.com"}
        assert client.get("/info", headers=right).status_code == 200


def test_without_a_key_only_requests_to_this_machine_by_its_name_are_answered(index: dict[str, Any]) -> None:
    with served(index) as client:
        for host in ("evil.example.com", "evil.example.com:8000", "127.0.0.1.evil.example.com", "", "[::2]:8000"):
            assert message(client.get("/info", headers={"Host": host})).startswith("400 without an API key")
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:9", "127.0.0.2:8000", "[::1]:8000", "[::1]"):
            assert client.get("/info", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/search", "/v1/embeddings"])
def test_a_body_above_the_limit_is_refused_whether_it_says_its_length_or_not(path: str, index: dict[str, Any]) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            sent.append(b" " * 100)
            yield sent[-1]

    sent: list[bytes] = []
    with served(index, body_bytes=1000) as client:
        assert message(client.post(path, content=b" " * 1001, headers=JSON)).startswith(
            "413 the body is larger than 1000"
        )
        assert message(client.post(path, content=chunks(), headers=JSON)).startswith("413 ")
        assert sent, "the length was not known"
        assert message(client.post(path, content=b" " * 1000, headers=JSON)).startswith("400 ")
        form = {"files": {"image": ("a.png", b"a" * 2000)}}
        assert message(client.post("/search", **form)).startswith("413 ")


def test_bodies_take_bounded_memory_together(index: dict[str, Any]) -> None:
    with served(index, waiting_bytes=1000) as client:
        for _ in range(3):
            refused = client.post("/search", content=b" " * 1001, headers=JSON)
            assert message(refused).startswith("503 the bodies of all requests")
        assert client.post("/search", json={"text": "red"}).status_code == 200


class SlowModel(FakeModel):
    """Holds every batch until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = threading.Event()
        self.is_holding = threading.Event()

    def encode_query(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> Any:  # noqa: ANN401
        self.is_holding.set()
        assert self.may_go.wait(60)
        return super().encode_query(inputs, batch_size, show_progress_bar)


def test_one_request_too_many_gets_a_retry_after(index: dict[str, Any]) -> None:
    model = SlowModel()
    answers = []
    with served(index, model=model, waiting=2) as client:
        ask = lambda: answers.append(client.post("/search", json={"text": "red"}))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        assert model.is_holding.wait(60)
        threads[1].start()
        time.sleep(1)  # until the second has arrived
        refused = client.post("/search", json={"text": "red"})
        assert message(refused).startswith("503 2 requests are being answered")
        assert refused.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
        model.may_go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert client.post("/search", json={"text": "red"}).status_code == 200


def test_a_request_that_takes_too_long_is_given_up_and_leaves_no_trace(index: dict[str, Any]) -> None:
    model = SlowModel()
    with served(index, model=model, seconds=0.3) as client:
        assert message(client.post("/search", json={"text": "red"})).startswith("503 ")
        model.may_go.set()
        assert client.post("/search", json={"text": "red"}).status_code == 200


class TiringModel(FakeModel):
    def encode_query(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> Any:  # noqa: ANN401
        time.sleep(0.1)
        return super().encode_query(inputs, batch_size, show_progress_bar)


def test_a_request_that_has_timed_out_is_not_embedded_to_its_end(index: dict[str, Any]) -> None:
    model = TiringModel()
    with served(index, model=model, seconds=0.5) as client:
        assert message(client.post("/v1/embeddings", json={"input": ["red"] * 2048})).startswith("503 ")
        embedded = -1
        while len(model.queries) > embedded:
            embedded = len(model.queries)
            time.sleep(0.5)
        assert 0 < embedded < 2048
        assert client.post("/search", json={"text": "red"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_an_address_that_others_can_reach_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="can be reached from other machines; give --api-key"):
        check_address(host, None)
    check_address(host, KEY)


def test_loopback_needs_no_key_and_a_key_fits_in_a_header() -> None:
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost", "LOCALHOST"):
        check_address(host, None)
    for key in ("", " ", "a b", "clé", "a\nb"):
        with pytest.raises(UsageError, match="the API key is empty or has characters"):
            check_address("127.0.0.1", key)


def test_other_sites_cannot_read_a_response(index: dict[str, Any]) -> None:
    with served(index) as client:
        headers = client.get("/info", headers={"Origin": "https://evil.example.com"}).headers
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers
    assert "default-src 'self'" in headers["content-security-policy"]


def test_an_answer_is_not_delayed_by_nagles_algorithm() -> None:
    with bind("127.0.0.1", 0) as bound, bind("localhost", 0) as named:
        assert bound.proto == named.proto == socket.IPPROTO_TCP, "asyncio sets TCP_NODELAY on no other socket"


def test_a_port_that_is_taken_is_named() -> None:
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with taken, pytest.raises(Exception, match=f"cannot listen on 127.0.0.1 port {port} .*; give another --port"):
        bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["..", ".example.com", "a" * 70, "192.0.2.1"])
def test_a_host_that_is_not_this_machines_is_named(host: str) -> None:
    with pytest.raises(CocoaError, match="give another --host"):
        bind(host, 0)
