"""An OpenAI-compatible endpoint on loopback that answers as a test says."""

import base64
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image
from stub_server import running


class Reply(NamedTuple):
    """A status, a body and headers."""

    body: str
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


class Asked(NamedTuple):
    """A request: its number from 0, prompt, image, model, and what was sent as authorization."""

    number: int
    prompt: str
    image: Image.Image
    model: str
    authorization: str | None

    @property
    def is_about_questions(self) -> bool:
        return "Q:" in self.prompt


def completion(text: str | None, end: str = "stop", **message: Any) -> Reply:
    """Return a chat completion."""
    return Reply(json.dumps({"choices": [{"message": {"content": text, **message}, "finish_reason": end}]}))


def colour(image: Image.Image) -> str:
    """Name the colour of an image of one colour, which JPEG changes a little."""
    return max(zip(image.getpixel((0, 0)), ("red", "green", "blue"), strict=True))[1]


class ChatEndpoint(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Callable[[Asked], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.lock = answer, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *args: Any) -> None:
        """Say nothing: the client may have gone."""


class Handler(BaseHTTPRequestHandler):
    server: ChatEndpoint

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, text = request["messages"][0]["content"]
        image = Image.open(BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
        with self.server.lock:
            number = len(self.server.asked)
            asked = Asked(number, text["text"], image, request["model"], self.headers.get("Authorization"))
            self.server.asked.append(asked)
        reply = self.server.answer(asked)
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body.encode())), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body.encode())


@contextmanager
def answering(answer: Callable[[Asked], Reply]) -> Iterator[ChatEndpoint]:
    """Answer requests in threads."""
    with running(ChatEndpoint(answer)) as server:
        yield server
