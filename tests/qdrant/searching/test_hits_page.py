"""The page of hits in a browser: everything is shown, and fits a phone."""

from pathlib import Path

import pytest
from browser import Browser, HtmlElements, needs_chromium
from PIL import Image

from cocoa_embed.integrations.qdrant.searching.hits_page import write_hits_page
from cocoa_embed.integrations.qdrant.stores.base import Hit

pytest.importorskip("jinja2")

LONG = "a_very-long.name" * 20


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_the_gallery_fits_the_screen_and_breaks_paths_between_folders(tmp_path: Path, width: int, dark: bool) -> None:
    (tmp_path / "holiday pictures").mkdir()
    file = tmp_path / "holiday pictures" / 'it\'s "red" <b>.png'
    Image.new("RGB", (80, 40), "red").save(file)
    payloads = {str(file): {"caption": f"<i>{LONG}</i>"}, f"/gone/{LONG}.png": {}}
    hits = [Hit(path, 0.5, path, payload) for path, payload in payloads.items()]
    page = tmp_path / "hits.html"
    write_hits_page(page, LONG, hits, Image.new("RGB", (40, 80), "teal"))
    with Browser(tmp_path, width, dark=dark) as browser:
        browser.open(page.as_uri())
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.run("[...document.images].map(each => each.naturalWidth > 0)") == [True, True]
        assert browser.run("document.querySelector('.caption').textContent") == f"<i>{LONG}</i>"
        assert browser.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(22, 18, 15)" if dark else "rgb(250, 247, 243)"
        )
        assert browser.faults == []
    elements = HtmlElements(page.read_text(encoding="utf-8"))
    assert [each.text for each in elements.find("span", "path")] == list(payloads)
    assert [each.text for each in elements.find("span", "broken")] == ["The image file cannot be read."]
    assert all(each.startswith("data:") for each in elements.loaded())
