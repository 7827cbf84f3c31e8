"""HTML pages: their elements, and how headless Chromium, if installed, shows them."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")

LOOK = """<pre id="seen"></pre><script>
const brokenWords = cell => {
  const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), broken = [], range = document.createRange();
  while (texts.nextNode()) {
    for (const word of texts.currentNode.data.matchAll(/[\\p{L}\\p{N}.]+/gu)) {
      range.setStart(texts.currentNode, word.index);
      range.setEnd(texts.currentNode, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(line => line.top)).size > 1) broken.push(word[0]);
    }
  }
  return broken;
};
onload = () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument;
    return [frame.id, {
      width: page.documentElement.scrollWidth,
      sections: [...page.querySelectorAll("section")].filter(each => each.offsetHeight > 0).map(each => each.id),
      images: page.images.length,
      decoded: [...page.images].filter(each => each.complete && each.naturalWidth > 0).length,
      scrolled: [...page.querySelectorAll(".scroll")].filter(each => each.scrollWidth > each.clientWidth).length,
      broken: [...page.querySelectorAll("td, th")].flatMap(brokenWords),
    }];
  });
  document.getElementById("seen").textContent = JSON.stringify(Object.fromEntries(seen));
}</script>"""


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
    wrapper.write_text(f'<!DOCTYPE html><meta charset="utf-8">{frames}{LOOK}', encoding="utf-8")
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", wrapper.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="seen">(\{.*?\})</pre>', dom)
    assert found, "the page's script did not run"
    documents: dict[str, dict[str, Any]] = json.loads(html.unescape(found[1]))
    return documents


VOID = {"meta", "img", "br", "hr", "input", "link", "wbr"}


class Element(NamedTuple):
    """An element with all text inside it, white space collapsed; ``parent`` is the tag of the element around it."""

    tag: str
    attributes: dict[str, str]
    text: str
    parent: str


class HtmlElements(HTMLParser):
    """The elements of a page in order; fails if a tag is closed in the wrong place or not at all."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self._found: list[tuple[str, dict[str, str], list[str], str]] = []
        self._open: list[int] = []
        self.feed(page)
        self.close()
        assert not self._open, f"not closed: {[self._found[index][0] for index in self._open]}"
        self.all = [
            Element(tag, attributes, " ".join("".join(text).split()), parent)
            for tag, attributes, text, parent in self._found
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(len(self._found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parent = self._found[self._open[-1]][0] if self._open else ""
        self._found.append((tag, {name: value or "" for name, value in attrs}, [], parent))

    def handle_endtag(self, tag: str) -> None:
        opened = self._found[self._open.pop()][0]
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self._found[index][2].append(data)

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
