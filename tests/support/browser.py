"""HTML pages: their elements, and how headless Chromium, if installed, shows them."""

import base64
import fcntl
import html
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

SECONDS = 180
"""How long to wait for what a browser does in one, on a machine that does much else."""

LOOK = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")

OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def seen(pages: dict[str, tuple[int, str]], folder: Path) -> dict[str, dict[str, Any]]:
    """Show each page in a frame of its width in pixels.

    :returns: By page: its ``width``, the ids of its ``sections``, the number of its ``images`` and of those that are
        ``decoded``, of elements of the class "scroll" that are ``scrolled``, and the ``broken`` words of its tables.
    """
    frames = "".join(
        f'<iframe id="{name}" style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(page)}"></iframe>'
        for name, (width, page) in pages.items()
    )
    wrapper = folder / "frames.html"
    wrapper.write_text(
        f'<!DOCTYPE html><meta charset="utf-8">{frames}<pre id="seen"></pre><script>{LOOK}</script>', encoding="utf-8"
    )
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", wrapper.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    found = re.search(r'<pre id="seen">(\{.*?\})</pre>', dom)
    assert found, "the page's script did not run"
    documents: dict[str, dict[str, Any]] = json.loads(html.unescape(found[1]))
    return documents


class Browser:
    """A tab of headless Chromium, driven through its debugging pipe; ``faults`` are the errors on its console."""

    def __init__(self, folder: Path, width: int = 1100, height: int = 900, *, dark: bool = False) -> None:
        (there, self._commands), (self._answers, back) = os.pipe(), os.pipe()
        self._received, self._last = b"", 0
        self.faults: list[str] = []
        self._session: str | None = None
        # The browser reads descriptor 3 and writes 4: ours get higher numbers, which these cannot overwrite.
        pipes = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (there, back)]
        command = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'
        options = [*OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, *map(str, pipes), str(CHROMIUM), *options],
            pass_fds=pipes,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (there, back, *pipes):
            os.close(each)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=SECONDS)
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            assert select.select([self._answers], [], [], SECONDS)[0], "the browser does not answer"
            data = os.read(self._answers, 1 << 20)
            assert data, "the browser has ended"
            self._received += data
        line, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") == "Runtime.exceptionThrown":
            self.faults.append(message["params"]["exceptionDetails"]["exception"].get("description", "?"))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["source"] != "network":
            self.faults.append(message["params"]["entry"]["text"])
        return message

    def run(self, expression: str) -> Any:  # noqa: ANN401  what the script returns
        """Return the value of a JavaScript expression in the page."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition} has not become true: {self.run('document.body.innerText')}"
            time.sleep(0.02)

    def open(self, address: str) -> None:
        """Go to an address and wait until the page is loaded."""
        self.call("Page.navigate", url=address)
        self.wait_for(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")

    def write(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = {"text": "\r"} if key == "Enter" else {} if key in codes else {"text": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=codes.get(key, 0), **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=codes.get(key, 0))

    def click(self, selector: str) -> None:
        """Click the middle of the first element of a selector with the mouse."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drop(self, selector: str, files: Sequence[Path]) -> None:
        """Drag files over an element and drop them there."""
        x, y = self._middle(selector)
        data = {"items": [], "files": list(map(str, files)), "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def _middle(self, selector: str) -> tuple[float, float]:
        element = f"document.querySelector({json.dumps(selector)})"
        box = self.run(f"({element}.scrollIntoView({{block: 'nearest'}}), {element}.getBoundingClientRect().toJSON())")
        assert box["width"] > 0, f"{selector} is not shown"
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def picture(self, file: Path) -> None:
        """Write what the page looks like as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


VOID = {"meta", "img", "br", "hr", "input", "link", "wbr"}


@dataclass
class Element:
    """An element; ``parent`` is the tag of the element around it."""

    tag: str
    attributes: dict[str, str]
    parent: str
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside it, white space collapsed."""
        return " ".join("".join(self.pieces).split())


class HtmlElements(HTMLParser):
    """The elements of a page in order; fails if a tag is closed in the wrong place or not at all."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[Element] = []
        self._open: list[Element] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(self.all[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parent = self._open[-1].tag if self._open else ""
        self.all.append(Element(tag, {name: value or "" for name, value in attrs}, parent))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for each in self._open:
            each.pieces.append(data)

    def find(self, tag: str, css_class: str | None = None) -> list[Element]:
        """Return the elements of a tag, and of a class if one is given."""
        return [
            each
            for each in self.all
            if each.tag == tag and css_class in (None, *each.attributes.get("class", "").split())
        ]

    def loaded(self) -> list[str]:
        """Return the addresses that a browser would load, or follow inside the page."""
        names = ("src", "href", "xlink:href", "srcset", "data")
        return [value for each in self.all for name, value in each.attributes.items() if name in names]
