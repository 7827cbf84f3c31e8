"""HTML pages: their elements, and how headless Chromium, if installed, shows them."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

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
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="seen">(\{.*?\})</pre>', dom)
    assert found, "the page's script did not run"
    documents: dict[str, dict[str, Any]] = json.loads(html.unescape(found[1]))
    return documents


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
