"""Fetching from servers on this machine, which only these tests allow: they replace the check of addresses."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image
from raw_images import encoded

from cocoa_embed.errors import ImageError
from cocoa_embed.images import http as remote
from cocoa_embed.images.http import Fetcher
from cocoa_embed.images.load import load_image
from cocoa_embed.images.urls import is_public, shown_address

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MALFORMED = (b"SSH-2.0-OpenSSH_9.6\r\n", OK + b"A: b\r\n" * 5000, b"", CHUNKED + b"5\r\nabc", CHUNKED + b"zzz\r\n")
PNG = encoded(Image.new("RGB", (9, 5), "red"), "PNG")

Respond = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """A server with the response of a test's choice, which keeps its requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond: Respond = answer(PNG)
        self.asked: list[tuple[str, dict[str, str]]] = []

    def address(self, path: str = "/photo.png", host: str = "photos.test") -> str:
        return f"http://{host}:{self.server_port}{path}"

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that go away are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        self.server.respond(self)


def answer(body: bytes, status: int = 200, **headers: str) -> Respond:
    """Return a handler that sends a body, with its length unless the headers set one."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return respond


def endless(start: bytes, more: bytes, seconds: float = 0.0) -> Respond:
    """Return a handler that sends ``start``, and then ``more`` for ever, every so many seconds."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        while True:
            handler.wfile.write(more)
            time.sleep(seconds)

    return respond


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The addresses of names, which ``socket.getaddrinfo`` finds; others it looks up, if they are numbers."""
    addresses = {"photos.test": ["127.0.0.1"], "other.test": ["127.0.0.1"], "empty.test": []}
    look_up = socket.getaddrinfo

    def found(host: str, *args: object, **options: object) -> list:
        return [info for address in addresses.get(host, [host]) for info in look_up(address, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=found))
    return addresses


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> Iterator[Server]:
    """A server on 127.0.0.1, which passes for a public address; all others are checked."""
    loopback = ip_address("127.0.0.1")
    monkeypatch.setattr(remote, "is_public", lambda address: address == loopback or is_public(address))
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def fetcher_for(server: Server, **options: float) -> Fetcher:
    return Fetcher([f"photos.test:{server.server_port}"], **options)


def refusal(fetcher: Fetcher, address: str) -> str:
    """Return why an address is not fetched."""
    with pytest.raises(ImageError) as caught:
        fetcher.fetch(address)
    assert str(caught.value).isprintable()
    assert caught.value.source == shown_address(address)
    return caught.value.reason


def test_an_image_is_fetched_from_an_allowed_host_at_the_address_that_was_checked(
    server: Server, names: dict[str, list[str]]
) -> None:
    fetcher = fetcher_for(server)
    assert fetcher.fetch(server.address("/a%20b.png?größe=1&x=%41")) == PNG
    looked_up = [call.args[0] for call in socket.getaddrinfo.call_args_list]
    assert looked_up == ["photos.test", "127.0.0.1"], "a second look-up of the name may lead to another machine"
    server.respond = answer(PNG, Content_Length="-5")
    assert fetcher.fetch(server.address()) == PNG
    server.respond = answer(PNG, Content_Length="20")
    with pytest.raises(ImageError, match="truncated"):
        load_image(fetcher.fetch(server.address()))
    path, headers = server.asked[0]
    assert path == "/a%20b.png?gr%C3%B6%C3%9Fe=1&x=%41"
    assert headers["Host"] == f"photos.test:{server.server_port}"
    assert headers["Accept-Encoding"] == "identity"


THIS_MACHINE = (
    *("127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "127.1", "0", "[::1]", "[::ffff:7f00:1]"),
    *("localhost", "LOCALHOST", "localhost."),
)


def test_names_and_numbers_of_this_machine_are_refused_even_if_they_are_allowed(names: dict[str, list[str]]) -> None:
    names["localhost"] = ["127.0.0.1", "::1"]
    fetcher = Fetcher(THIS_MACHINE)
    for host in THIS_MACHINE:
        assert "is not public" in refusal(fetcher, f"http://{host}/photo.png")
    names["photos.test"] = ["8.8.8.8", "2606:2800:220:1::1", "10.1.2.3"]
    reason = refusal(Fetcher(["photos.test"]), "http://photos.test/")
    assert reason == "is on photos.test, whose address 10.1.2.3 is not public"


def test_each_redirect_is_checked_as_the_first_address_is(server: Server, names: dict[str, list[str]]) -> None:
    names["inner.test"] = ["10.0.0.1"]
    fetcher = Fetcher([f"photos.test:{server.server_port}", "inner.test", "169.254.169.254"])
    for location, reason in {
        "http://inner.test/": "leads to http://inner.test/, which is on inner.test, whose address 10.0.0.1 is not",
        "http://169.254.169.254/latest/": "whose address 169.254.169.254 is not public",
        "//other.test/": "which is on other.test, which is not among the allowed hosts",
        server.address(host="other.test"): f"other.test:{server.server_port}, which is not among the allowed hosts",
        "file:///etc/passwd": "which is not an http or https address",
        "ftp://photos.test/a.png": "which is not an http or https address",
        "data:image/png;base64,AAAA": "which is not an http or https address",
        "http://me:secret@photos.test/": "leads to http://photos.test/, which has a user name in it",
        "http://photos.test/": "which is on photos.test, which is not among the allowed hosts",
        "http://[bad": "leads to a malformed address",
        "": "redirects without an address",
    }.items():
        server.respond = answer(b"", 302, Location=location)
        assert reason in refusal(fetcher, server.address())
        assert "secret" not in refusal(fetcher, server.address())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_on_the_host_are_followed(server: Server, status: int) -> None:
    places = ("one", "/two", server.address("/end"))
    steps = iter([*(answer(b"", status, Location=place) for place in places), answer(PNG)])
    server.respond = lambda handler: next(steps)(handler)
    assert fetcher_for(server).fetch(server.address("/")) == PNG
    assert [path for path, _ in server.asked] == ["/", "/one", "/two", "/end"]


def test_an_unknown_host_is_named_and_an_endless_lookup_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    reason = refusal(Fetcher(["photos.test"]), "http://photos.test/")
    assert reason == "is on photos.test, which cannot be found ([Errno -2] Name or service not known)"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    assert "takes too long" in refusal(Fetcher(["photos.test"], timeout=0.2), "http://photos.test/")


def redirect_slowly(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.2)
    answer(b"", 302, Location="/photo.png")(handler)


SHORT = {"timeout": 0.3, "deadline": 0.6}
SLOW = "takes too long (limits: 0.3 s per step, 0.6 s in all)"
SMALL = {"max_bytes": 100_000}
STATUSES = (204, 206, 304, 403, 404, 500)


@pytest.mark.parametrize(
    ("respond", "limits", "reason"),
    [
        *((answer(b"", status), {}, f"answers with the status {status}") for status in STATUSES),
        (answer(b"", 302, Location="/photo.png"), {}, "redirects more than 5 times"),
        (redirect_slowly, {"deadline": 0.5, "max_redirects": 100}, "takes too long"),
        (endless(OK + b"\r\n", b".", 0.1), SHORT, SLOW),
        (endless(OK + b"X-Long: ", b".", 0.1), SHORT, SLOW),
        (lambda handler: time.sleep(30), SHORT, SLOW),
        (endless(OK + b"\r\n", bytes(100_000)), SMALL, "is too large: the limit is 100000 bytes"),
        (endless(CHUNKED, b"1000\r\n" + bytes(0x1000) + b"\r\n"), SMALL, "is too large: the limit is 100000 bytes"),
        (answer(PNG, Content_Length="100001"), SMALL, "is too large: 100001 bytes, the limit is 100000"),
        (answer(PNG, Content_Length="9999"), {}, f"ends early: {len(PNG)} of 9999 bytes came"),
        (answer(PNG, Content_Encoding="gzip"), {}, "answers with the content encoding 'gzip', which was not requested"),
        *((lambda handler, raw=raw: handler.wfile.write(raw), {}, "cannot be fetched") for raw in MALFORMED),
    ],
)
def test_a_response_that_is_not_one_whole_image_in_time_is_refused(
    server: Server, respond: Respond, limits: dict[str, float], reason: str
) -> None:
    server.respond = respond
    assert reason in refusal(fetcher_for(server, **limits), server.address())


def test_the_next_address_of_a_host_is_tried(
    server: Server, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names["photos.test"] = ["127.0.0.2", "127.0.0.1"]
    loopback = remote.is_public
    monkeypatch.setattr(remote, "is_public", lambda address: str(address) == "127.0.0.2" or loopback(address))
    assert fetcher_for(server).fetch(server.address()) == PNG
    names["photos.test"] = ["127.0.0.2"]
    assert "cannot be fetched (" in refusal(fetcher_for(server), server.address())
    names["photos.test"] = []
    assert "cannot be fetched (it has no network address)" in refusal(fetcher_for(server), server.address())


ELSEWHERE = "is on {}, which is not among the allowed hosts"
REFUSED = {
    "is not an http or https address": ["ftp://photos.test/", "photo.png"],
    "has a user name in it": ["http://me@photos.test/", "http://me:secret@photos.test/", "http://@photos.test/"],
    "has spaces, control characters or backslashes": [
        *("http://other.test\\@photos.test/", "http://photos.test/a b.png", "http://photos.test\t/"),
        "http://photos.test/\r\nHost: other.test",
    ],
    "is not a valid address": [
        *("http:photos.test/", "http:///photo.png", "http://photos.test:70000/", "http://photos.test:port/"),
        *("http://photos..test/", "http://photos.test%2eother.test/", "http://%70hotos.test/", "http://[::1"),
        *("http://" + "a" * 300 + ".test/", "http://photos.test/\udcff"),
    ],
    ELSEWHERE.format("photos.test:8080"): ["http://photos.test:8080/"],
    ELSEWHERE.format("photos.test:443"): ["http://photos.test:443/"],
    ELSEWHERE.format("other.test"): ["http://other.test#@photos.test/", "http://other.test?@photos.test/"],
    ELSEWHERE.format("photos.test.other.test"): ["http://photos.test.other.test/"],
    "": ["http://[fe80::1%25eth0]/"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_addresses_that_are_not_allowed_are_refused_before_a_name_is_looked_up(
    names: dict[str, list[str]], reason: str
) -> None:
    fetcher = Fetcher(["photos.test"])
    for address in REFUSED[reason]:
        assert reason in refusal(fetcher, address)
    assert "is not among the allowed hosts" in refusal(Fetcher([]), "https://photos.test/")
    socket.getaddrinfo.assert_not_called()


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl to make a certificate with")
def test_https_checks_the_certificate_and_the_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=photos.test -addext"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), "subjectAltName=DNS:photos.test", *files], check=True, capture_output=True)
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    hosts = [f"{host}:{server.server_port}" for host in ("photos.test", "other.test")]
    address = server.address().replace("http:", "https:")
    assert "certificate verify failed" in refusal(Fetcher(hosts), address)
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    fetcher = Fetcher(hosts)
    assert fetcher.fetch(address) == PNG
    assert asked[-1] == "photos.test"
    assert server.asked[-1][1]["Host"] == f"photos.test:{server.server_port}"
    assert "Hostname mismatch" in refusal(fetcher, address.replace("photos.test", "other.test"))
    assert "cannot be fetched" in refusal(fetcher, server.address())
