"""The search page in a real browser, under a policy that allows nothing but the server's own files."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser import SECONDS, Browser, HtmlElements, needs_chromium
from PIL import Image
from stub_server import PAGE, StubServer, hit, running

pytestmark = pytest.mark.slow

HOSTILE = """<img src=x onerror="document.title='stolen'"> & "quotes" 'too'"""
KEY = "sécret 100%"
FACETS = [
    {"key": "mime", "kind": "keyword", "values": [["image/png", 900], ["image/jpeg", 334]]},
    {"key": '"shot by"', "kind": "keyword", "values": [[HOSTILE, 3], ["Ann", 2]]},
    {"key": "width", "kind": "number", "min": 20, "max": 4000},
    {"key": "mtime", "kind": "number", "min": 1.7e9, "max": 1.76e9},
    {"key": "height", "kind": "number", "min": 40, "max": 40},
    {"key": "caption", "kind": "text"},
]
TEXT, EXAMPLE, ERROR = "#text", "#example:not([hidden])", "#error:not([hidden])"
FOUND = "document.querySelectorAll('#hits li').length"
IDLE = "document.querySelector('main').ariaBusy === 'false'"
READY = "document.querySelector('#facets fieldset')"


class Opened(NamedTuple):
    server: StubServer
    browser: Browser

    def text(self, selector: str) -> str:
        return str(self.browser.run(f"document.querySelector('{selector}').innerText"))

    def focus(self) -> Any:  # noqa: ANN401  what the script returns
        """Return the place of the focused hit, or the id of the focused element."""
        return self.browser.run(
            "(at => at < 0 ? document.activeElement.id : at)"
            "([...document.querySelectorAll('#hits button')].indexOf(document.activeElement))"
        )

    def wait_for_search(self, count: int) -> dict[str, Any]:
        """Wait until so many searches were sent and answered, and return the last."""
        end = time.monotonic() + SECONDS
        while len(self.server.searches) < count and time.monotonic() < end:
            time.sleep(0.01)
        self.browser.wait_for(IDLE)
        assert len(self.server.searches) == count
        return self.server.searches[-1]

    def search(self, text: str) -> dict[str, Any]:
        self.browser.wait_for(IDLE)
        count = len(self.server.searches) + 1
        self.browser.run("(document.getElementById('text').value = '', document.getElementById('text').focus())")
        self.browser.write(text)
        self.browser.press("Enter")
        return self.wait_for_search(count)


@contextmanager
def opened(
    folder: Path, hits: list[dict[str, Any]], key: str | None = None, query: str = "", **options: Any
) -> Iterator[Opened]:
    with running(StubServer(hits, FACETS, key)) as server, Browser(folder, **options) as browser:
        browser.open(server.address + query)
        if key is None:
            browser.wait_for(READY)
        yield Opened(server, browser)
        assert browser.faults == []


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "it's mine.png")
    return tmp_path / "it's mine.png"


def test_the_page_is_well_formed_and_holds_neither_scripts_nor_addresses_of_others() -> None:
    page = HtmlElements((PAGE / "index.html").read_text(encoding="utf-8"))
    assert {*page.loaded()} == {"page.css", "page.js", "data:,"}
    assert [each.text for each in page.find("script")] == [""]
    assert not page.find("style")
    assert not [name for each in page.all for name in each.attributes if name.startswith("on") or name == "style"]
    labelled = {each.attributes["for"] for each in page.find("label")}
    assert labelled == {each.attributes["id"] for each in page.find("input")}
    for file in PAGE.iterdir():
        content = file.read_text(encoding="utf-8")
        assert "://" not in content, file
        assert "innerHTML" not in content, file


@needs_chromium
def test_a_text_is_searched_and_the_hits_are_walked_through_with_the_keyboard(tmp_path: Path) -> None:
    hits = [hit(number, f"picture {number}") for number in range(40)]
    with opened(tmp_path, hits) as page:
        assert page.text("#about") == "1,234 pictures, searched with cocoa"
        assert page.search("a lighthouse") == {"filters": [], "text": "a lighthouse", "limit": "30", "offset": "0"}
        assert page.text("#status") == "30 pictures, nearest first (0.03 s)"
        assert page.text("#hits li").split() == ["picture", "0", "1.000"]
        page.browser.wait_for("[...document.querySelectorAll('#hits img')].every(each => each.naturalWidth)")
        for key, focused in {"ArrowDown": 0, "ArrowRight": 1}.items():
            page.browser.press(key)
            assert page.focus() == focused
        page.browser.press("ArrowDown")
        columns = page.focus() - 1
        assert columns > 1
        page.browser.press("ArrowUp")
        page.browser.press("Enter")
        assert page.text("#full-name") == "picture 1"
        page.browser.wait_for("document.getElementById('full-image').naturalWidth === 600")
        page.browser.press("ArrowRight")
        assert page.text("#full-name") == "picture 2"
        page.browser.press("Escape")
        page.browser.wait_for("document.activeElement === document.querySelectorAll('#hits button')[2]")
        page.browser.press("Escape")
        assert page.focus() == "text"
        page.browser.run("document.activeElement.blur()")
        page.browser.press("/")
        assert (page.focus(), page.browser.run("document.getElementById('text').value")) == ("text", "a lighthouse")
        page.browser.click("#more")
        assert page.wait_for_search(2)["offset"] == "30"
        assert (page.browser.run(FOUND), page.browser.run("document.getElementById('more').hidden")) == (40, True)


@needs_chromium
def test_a_dropped_picture_is_searched_alone_with_a_text_and_for_more_like_a_hit(tmp_path: Path, picture: Path) -> None:
    with opened(tmp_path, [hit(1, "one"), hit(2)]) as page:
        page.browser.drop("#drop", [picture])
        page.browser.wait_for(FOUND)
        sent = {"filters": [], "image": picture.name, "limit": "30", "offset": "0"}
        assert page.wait_for_search(1) == sent
        assert page.text("#example-name") == picture.name
        page.browser.wait_for("document.getElementById('example-image').naturalWidth === 30")
        assert page.search("at night") == {**sent, "text": "at night"}
        page.browser.click("#hits li:last-child button")
        page.browser.click("#like")
        page.browser.wait_for("!document.getElementById('full').open")
        assert page.wait_for_search(3) == {"filters": [], "like": "2", "limit": "30", "offset": "0"}
        assert page.text("#example-name") == "Like 2.png"
        page.browser.run("history.back()")
        page.browser.wait_for("document.getElementById('text').value === 'at night'")
        assert page.wait_for_search(4) == {**sent, "text": "at night"}, "Back brings the picture too"
        page.browser.click("#remove")
        assert "image" not in page.wait_for_search(5)
        assert "like" not in page.server.searches[-1]
        page.browser.run(
            "(pasted => (pasted.items.add(new File(['no picture'], 'pasted.png', {type: 'image/png'})),"
            " document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: pasted}))))(new DataTransfer())"
        )
        page.browser.wait_for(f"document.querySelector('{ERROR}')")
        assert page.text("#example-name") == "pasted.png"


@needs_chromium
def test_facets_become_filters_of_the_command_line_and_the_address_keeps_them(tmp_path: Path) -> None:
    from cocoa_embed.integrations.qdrant.searching.filters import parse_filters

    with opened(tmp_path, [hit(1)]) as page:
        legends = page.browser.run("[...document.querySelectorAll('legend')].map(each => each.textContent)")
        assert legends == ["mime", "shot by", "caption", "width", "modified"], "a single height is no choice"
        page.search("red")
        page.browser.click("#facets fieldset:nth-child(2) label")
        page.wait_for_search(2)  # before the next: searches that overtake each other are counted in any order
        page.browser.click("#facets fieldset:nth-child(2) label + label")
        page.wait_for_search(3)
        typed = {"width>=": "100", "mtime<=": "2025-03-01", "caption~": 'a "b"'}
        for count, (name, value) in enumerate(typed.items(), 4):
            field = f"document.querySelector('[name=\"{name}\"]')"
            page.browser.run(
                f"({field}.value = '{value}', {field}.dispatchEvent(new Event('change', {{bubbles: true}})))"
            )
            filters = page.wait_for_search(count)["filters"]
        quoted = HOSTILE.replace('"', '\\"')
        expected = [f'"shot by"="{quoted}"|Ann', 'caption~"a \\"b\\""', "width>=100", "mtime<=2025-03-01"]
        assert filters == expected
        assert parse_filters(filters)
        assert page.text("#chosen") == "(5)"
        page.browser.open(page.browser.run("location.href"))
        page.browser.wait_for(f"{READY} && {FOUND}")
        assert page.wait_for_search(count + 1)["filters"] == filters
        assert page.browser.run("document.querySelectorAll('#facets :checked').length") == 2
        page.browser.click("#clear")
        assert page.wait_for_search(count + 2)["filters"] == []
        assert page.browser.run("document.querySelectorAll('#facets :checked').length") == 0


@needs_chromium
def test_captions_paths_and_values_are_shown_as_they_are(tmp_path: Path) -> None:
    path = f"/a b/{HOSTILE}/it's.png"
    with opened(tmp_path, [hit(1, HOSTILE), hit(2, "", path, **{"shot by": HOSTILE})]) as page:
        page.search(HOSTILE)
        assert page.browser.run("[...document.querySelectorAll('#hits img')].map(each => each.alt)") == [
            HOSTILE,
            "it's.png",
        ]
        assert page.text("#hits .caption") == HOSTILE
        assert HOSTILE in page.text("#facets")
        page.browser.click("#hits li:last-child button")
        assert page.text("#facts div:first-child dd") == path
        assert page.text("#facts").count(HOSTILE) == 2
        assert page.browser.run("document.title") == "holiday"
        assert page.browser.run("document.querySelectorAll('[src=x]').length") == 0


@needs_chromium
def test_failures_and_empty_results_are_explained(tmp_path: Path, picture: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture")
    with opened(tmp_path, []) as page:
        page.search("red")
        assert page.text("#status") == "Nothing found. The collection has no pictures."
        page.browser.click("#facets label")
        page.wait_for_search(2)
        assert page.text("#status") == "Nothing found. No picture passes all filters."
        page.browser.drop("#drop", [tmp_path / "notes.txt"])
        page.browser.wait_for(f"document.querySelector('{ERROR}')")
        assert page.text(ERROR) == "notes.txt is not a picture."
        assert len(page.server.searches) == 2
        page.browser.drop("#drop", [tmp_path / "broken.png"])
        page.browser.wait_for(f"document.querySelector('{EXAMPLE}')")
        page.wait_for_search(2)
        assert page.text(ERROR) == "broken.png: is not an image"
        page.browser.click("#remove")
        page.server.hits, page.server.broken = [hit(1, "one"), hit(2, "two")], {"1"}
        page.search("red")
        page.browser.wait_for("document.querySelector('#hits .broken')")
        assert page.text("#hits .broken") == "/pictures/1.png has changed since it was indexed"
        page.browser.click("#hits button")
        page.browser.wait_for("!document.getElementById('full-error').hidden")
        assert page.text("#full-error") == "/pictures/1.png has changed since it was indexed"
        page.browser.press("Escape")
        page.browser.wait_for("!document.querySelector('dialog[open]')")
        page.browser.call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
        )
        page.browser.press("/")
        page.browser.wait_for("document.activeElement.matches('input')")
        page.browser.press("Enter")
        page.browser.wait_for(f"document.querySelector('{ERROR}')")
        assert page.text(f"{ERROR} span") == "The server does not answer. Is it still running?"
        assert page.browser.run(FOUND) == 0
        page.browser.call(
            "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        page.browser.click("#retry")
        page.browser.wait_for(f"{FOUND} === 2 && document.getElementById('error').hidden")


@needs_chromium
def test_the_key_is_asked_for_once_and_never_stored(tmp_path: Path) -> None:
    with opened(tmp_path, [hit(1), hit(2)], key=KEY, query="?text=red") as page:
        page.browser.wait_for("document.getElementById('unlock').open")
        for given, then in {"wrong": "!document.getElementById('unlock-error').hidden", KEY: FOUND}.items():
            page.browser.write(given)
            page.browser.press("Enter")
            page.browser.wait_for(then)
        page.browser.wait_for("[...document.querySelectorAll('#hits img')].every(each => each.naturalWidth)")
        page.browser.wait_for(READY)
        assert not page.browser.run("document.getElementById('unlock').open")
        page.wait_for_search(1)
        page.search("blue")
        stored = page.browser.run(
            "JSON.stringify([localStorage, sessionStorage, document.cookie, history.state, location])"
        )
        assert KEY not in stored


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_everything_fits_the_screen_in_the_colours_of_the_system(tmp_path: Path, width: int, dark: bool) -> None:
    long = "x" * 300
    with opened(tmp_path, [hit(1, long), hit(2, "", f"/{long}.png")], width=width, dark=dark) as page:
        page.search(long)
        page.browser.run("document.getElementById('filters').open = true")
        shown = (
            "[document.documentElement, document.getElementById('full')].every(each => each.scrollWidth <= innerWidth)"
        )
        assert page.browser.run(shown)
        page.browser.click("#hits button")
        assert page.browser.run(shown)
        colour = page.browser.run("getComputedStyle(document.body).backgroundColor")
        assert colour == ("rgb(22, 18, 15)" if dark else "rgb(250, 247, 243)")
