"""A small server of the API that the search page talks to, without an index or a model."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from PIL import Image, UnidentifiedImageError

import cocoa_embed

PAGE = Path(cocoa_embed.__file__).parent / "serve" / "page"
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}


def hit(number: int, caption: str = "", path: str | None = None, **payload: Any) -> dict[str, Any]:
    """Return a hit as the API has it."""
    path = path or f"/pictures/{number}.png"
    sizes = {"width": 60, "height": 40}
    fields = {"path": path, "caption": caption, "mime": "image/png", **sizes, **payload}
    return {"id": str(number), "score": 1 - number / 100, "path": path, "caption": caption, **sizes, "payload": fields}


class StubServer(ThreadingHTTPServer):
    """Every search finds ``hits``; ``searches`` are the forms that were sent; ``broken`` ids have no picture."""

    daemon_threads = True

    def __init__(self, hits: list[dict[str, Any]], facets: list[dict[str, Any]], key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hits, self.facets, self.key = hits, facets, key
        self.searches: list[dict[str, Any]] = []
        self.broken: set[str] = set()
        self.address = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: StubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, content: bytes, media_type: str, status: int = 200) -> None:
        self.send_response(status)
        headers = {"Content-Type": media_type, "Content-Length": str(len(content)), "Content-Security-Policy": POLICY}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def answer_json(self, document: Any, status: int = 200) -> None:  # noqa: ANN401  JSON of any kind
        self.answer(json.dumps(document).encode(), "application/json", status)

    def fail(self, status: int, message: str) -> None:
        self.answer_json({"error": {"message": message}}, status)

    @property
    def is_refused(self) -> bool:
        given = self.headers.get("Authorization", "").encode("latin-1")
        return self.server.key is not None and given != f"Bearer {self.server.key}".encode()

    def do_GET(self) -> None:
        first, _, id_ = unquote(urlsplit(self.path).path).strip("/").partition("/")
        if (file := PAGE / (first or "index.html")).is_file():
            self.answer(file.read_bytes(), TYPES[file.suffix])
        elif self.is_refused:
            self.fail(401, "send the server's API key as Authorization: Bearer KEY")
        elif first == "info":
            fields = {"collection": "holiday", "model": "cocoa", "points": 1234, "facets": self.server.facets}
            self.answer_json(fields)
        elif id_ in self.server.broken:
            self.fail(404, f"/pictures/{id_}.png has changed since it was indexed")
        elif first in ("thumbnail", "image"):
            picture = Image.new(
                "RGB", (60, 40) if first == "thumbnail" else (600, 400), f"hsl({int(id_) * 47}, 50%, 50%)"
            )
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            self.answer(buffer.getvalue(), "image/png")
        else:
            self.fail(404, "Not Found")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.is_refused:
            return self.fail(401, "send the server's API key as Authorization: Bearer KEY")
        message = BytesParser(policy=HTTP).parsebytes(
            b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body
        )
        form: dict[str, Any] = {"filters": []}
        for part in message.iter_parts():
            name, content = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)
            if name == "image":
                form["image"] = part.get_filename()
                try:
                    Image.open(io.BytesIO(content)).load()
                except UnidentifiedImageError:
                    return self.fail(422, f"{form['image']}: is not an image")
            elif name == "filters":
                form["filters"].append(content.decode())
            else:
                form[name] = content.decode()
        self.server.searches.append(form)
        start = int(form["offset"])
        self.answer_json({"hits": self.server.hits[start : start + int(form["limit"])], "seconds": 0.034})


Server = TypeVar("Server", bound=ThreadingHTTPServer)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Answer requests in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
