"""An HTML page as a list of its elements."""

from html.parser import HTMLParser
from typing import NamedTuple

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
