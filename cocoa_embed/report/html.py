"""Render templates as self-contained HTML pages that look like the search page of the server."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cocoa_embed.errors import require
from cocoa_embed.report.words import cut

STYLES = Path(__file__).parents[1] / "serve" / "page"
"""The folder of the shared stylesheet."""


def render(
    template: Path, extra: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: object
) -> str:
    """Return a page.

    :param template: A template that extends ``base.html.jinja``.
    :param extra: The extra that an error names if Jinja2 is not installed.
    :param filters: Additional filters of the template.
    :param values: The variables of the template; ``title`` is the heading.
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
    return page.encode("utf-8", errors="backslashreplace").decode("utf-8")  # file names need not be valid Unicode
