"""The options of commands that embed images: how the model runs, and what sources give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from cocoa_embed.errors import UsageError

if TYPE_CHECKING:
    from cocoa_embed.sources.base import SourceOptions

DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        "--device",
        help="The torch device, or several, a process each: cuda:0,cuda:1, or all [default: the fastest].",
    ),
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Threads a device that prepare images.")]
BatchTokensOption = Annotated[
    int | None, typer.Option(min=1, help="The most visual tokens in a batch [default: 8192].")
]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Load the weights as this type [default: as stored].")]
MaxPixelsOption = Annotated[
    int | None, typer.Option(min=1, help="Scale larger images down to this [default: the model's own limit].")
]
RevisionOption = Annotated[str | None, typer.Option(help="The branch, tag or commit of a model on the hub.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model comes with.")]
AllowHostOption = Annotated[
    list[str] | None, typer.Option("--allow-host", help="Fetch web addresses on this host; repeatable.")
]
EveryOption = Annotated[float, typer.Option(min=0.001, help="Seconds between two frames of a video.")]
IncludeOption = Annotated[
    str, typer.Option(help="Other files that folders give beside photographs: archive,table,pdf,video.")
]


ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Pass over files and folders, as in .gitignore (repeatable)."),
]


def source_options(
    allow_host: list[str] | None, every: float, include: str, exclude: list[str] | None
) -> SourceOptions:
    """Return the options of sources."""
    from cocoa_embed.sources.base import SourceOptions

    kinds = frozenset(kind for each in include.split(",") if (kind := each.strip()))
    hosts, patterns = tuple(allow_host or ()), tuple(exclude or ())
    return SourceOptions(allowed_hosts=hosts, every=every, include=kinds, exclude=patterns)


def model_options(devices: str | None, **options: Any) -> dict[str, Any]:
    """Return the keyword arguments of ``open_encoder``.

    :raises UsageError: If a list of devices names none.
    """
    if devices is None or (devices != "all" and "," not in devices):
        return {"device": devices, **options}
    if devices != "all":
        from cocoa_embed.encode.devices import read_devices

        read_devices(devices)
    return {"devices": devices, **options}


def read_share(text: str) -> tuple[int, int]:
    """Return the two numbers of ``--shard i/n``.

    :raises UsageError: If it has another form, or ``i`` is not between 1 and ``n``.
    """
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(
            f"--shard {text} is not of the form i/n, with i from 1 to n; give 1/4 on the first of four machines"
        )
    return int(first), int(last)
