"""Renders templates as HTML pages that need no other file and look like the search page of the server."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cocoa_embed.errors import require
from cocoa_embed.report.words import cut

STYLES = Path(__file__).parents[1] / "serve" / "page"
"""The folder of the one stylesheet."""


def render(
    template: Path, extra: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: object
) -> str:
    """Return a page.

    :param template: Extends ``base.html.jinja``.
    :param extra: The extra that an error names if Jinja2 is not installed.
    :param filters: The template's own filters.
    :param values: Its variables; ``title`` is the heading.
    :raises MissingExtraError: If Jinja2 is not installed.
    """
    jinja2 = require("jinja2", extra)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent, STYLES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cut": cut, **(filters or {})}
    page: str = environment.get_template(template.name).render(**values)
    return page.encode("utf-8", errors="backslashreplace").decode("utf-8")  # names of files need not be Unicode
