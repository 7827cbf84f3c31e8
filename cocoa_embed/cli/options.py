"""The options of commands that embed images: how the model runs, and what is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cocoa_embed.model.loading import Dtype

if TYPE_CHECKING:
    from cocoa_embed.sources.base import SourceOptions

MODEL_HELP = "A SentenceTransformer folder, or owner/name on the Hugging Face hub."
ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
DeviceOption = Annotated[str | None, typer.Option("--device", help="The torch device [default: the fastest].")]
DimensionOption = Annotated[int | None, typer.Option(min=1, help="Truncate embeddings to this many dimensions.")]
MaxPixelsOption = Annotated[
    int | None, typer.Option(min=1, help="Scale larger images down to this many pixels [default: the model's limit].")
]
EmbedOption = Annotated[
    Literal["image", "image+caption", "both"] | None,
    typer.Option(
        help="Embed the image, the image with its caption in one vector, or each in its own [default: image]."
    ),
]


@dataclass(frozen=True)
class Devices:
    """Where a model runs, with how many threads, and how large its batches are."""

    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            "--device",
            help="The torch device, or several, one process each: cuda:0,cuda:1, or all [default: the fastest].",
        ),
    ] = None
    workers: Annotated[int | None, typer.Option(min=1, help="Threads per device that prepare images.")] = None
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most visual tokens in a batch [default: 8192].")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of ``open_encoder``.

        :raises UsageError: If a list of devices names none.
        """
        given = self.devices or ""
        if "," in given:
            from cocoa_embed.encode.devices import read_devices

            read_devices(given)
        name = "devices" if "," in given or given == "all" else "device"
        return {name: self.devices, "workers": self.workers, "batch_tokens": self.batch_tokens}


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    dtype: Annotated[Dtype | None, typer.Option(help="Load the weights as this type [default: as stored].")] = None
    max_pixels: MaxPixelsOption = None
    revision: Annotated[str | None, typer.Option(help="The branch, tag or commit of a model on the hub.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model comes with.")
    ] = False


@dataclass(frozen=True)
class Sources:
    """Which files and addresses are read."""

    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="Fetch web addresses on this host; repeatable.")
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Pass over files and folders, as in .gitignore (repeatable)."),
    ] = None
    every: Annotated[float, typer.Option(min=0.001, help="Seconds between two frames of a video.")] = 10.0
    include: Annotated[
        str, typer.Option(help="Other files to read in folders besides photographs: archive,table,pdf,video.")
    ] = ""

    def options(self) -> SourceOptions:
        """Return the options of sources."""
        from cocoa_embed.sources.base import SourceOptions

        kinds = frozenset(kind for each in self.include.split(",") if (kind := each.strip()))
        hosts, patterns = tuple(self.allow_host or ()), tuple(self.exclude or ())
        return SourceOptions(allowed_hosts=hosts, every=self.every, include=kinds, exclude=patterns)
