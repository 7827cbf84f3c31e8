"""Pages as a real browser shows them: Chromium without a window, where it is installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

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
