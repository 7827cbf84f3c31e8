"""Functions become commands: a dataclass is its options, and a returned document is what ``--json`` prints."""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from cocoa_embed.cli.main import main
from cocoa_embed.cli.output import as_command


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(help="How wide.")] = 2
    height: Annotated[int, typer.Option(help="How high.")] = 3


def draw(*, first: bool = False, size: Size, name: Annotated[str, typer.Option(help="The name.")]) -> dict[str, Any]:
    """Draw."""
    return {"size": repr(size), "failed": [name] if first else []}


def write(size: Size) -> None:
    """Write."""


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
for function in (draw, write):
    app.command()(as_command(function))


@pytest.mark.parametrize(
    ("words", "status", "document"),
    [
        (["--height", "5"], 0, None),
        (["--height", "5", "--json"], 0, {"size": "Size(width=2, height=5)", "failed": []}),
        (["--first", "--json"], 1, {"size": "Size(width=2, height=3)", "failed": ["a"]}),
        (["--first"], 1, None),
        (["--size", "5"], 2, None),
    ],
)
def test_a_document_is_printed_for_json_and_what_failed_is_the_status(
    words: list[str], status: int, document: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["draw", "--name", "a", *words], app)
    printed = capsys.readouterr().out
    assert (stopped.value.code, json.loads(printed) if printed else None) == (status, document)


def test_help_has_the_options_of_a_group_in_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    for command, options in (
        ("draw", ["--first", "--width", "--height", "--name", "--json", "--help"]),
        ("write", ["--width", "--height", "--help"]),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"], app)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("  --")] == options


def test_a_document_that_cannot_be_printed_is_reported_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = Path("/dev/full").open("w")
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit, match="1"):
        main(["draw", "--name", "a", "--json"], app, "test")
    assert "cocoa-embed: standard output cannot be written (No space left on device)" in capsys.readouterr().err
    with suppress(OSError):  # the same again
        full.close()
