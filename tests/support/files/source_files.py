"""Archives, tables, documents and videos for the tests of sources, and what a source yields."""

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from cocoa_embed.errors import ImageError
from cocoa_embed.sources.base import Source, SourceOptions
from cocoa_embed.sources.open import all_sources


class Found(NamedTuple):
    """What a place yields, once read."""

    contents: dict[str, bytes]
    """By relative key."""
    metadata: dict[str, dict[str, Any]]
    faults: list[str]
    """The messages of images and of shards."""
    versions: dict[str, str]
    """Of the shards."""


def read(place: str | Path | Sequence[Source], **options: Any) -> Found:
    """Read everything that a place, or sources, yield."""
    sources = all_sources([place], SourceOptions(**options)) if isinstance(place, str | Path) else place
    found = Found({}, {}, [], {})
    for source in sources:
        for shard in source.shards():
            found.versions[shard.key] = shard.version
            try:
                for record in shard.records():
                    assert source.covers(record.key), record.key
                    assert not source.is_deleted(record.key), record.key
                    found.metadata[record.relative_key] = dict(record.metadata)
                    try:
                        found.contents[record.relative_key] = record.read()
                    except ImageError as error:
                        found.faults.append(str(error))
            except ImageError as error:
                found.faults.append(str(error))
    return found


def tar(members: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    """Return a tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def parquet_file(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a Parquet file."""
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def pdf(*colours: str, size: tuple[int, int] = (60, 40)) -> bytes:
    """Return a document with a page of each colour; a pixel is a point."""
    pages = [Image.new("RGB", size, colour) for colour in colours]
    buffer = io.BytesIO()
    pages[0].save(buffer, "PDF", save_all=True, append_images=pages[1:], resolution=72.0)
    return buffer.getvalue()


def video(shades: Iterable[int], rate: int = 10, size: tuple[int, int] = (64, 48), suffix: str = "mp4") -> bytes:
    """Return a video: a grey frame of each shade, brighter in its left half; key frames are a second apart."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=suffix) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", rate
        for frame in frames(shades, size):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def frames(shades: Iterable[int], size: tuple[int, int]) -> Iterator[av.VideoFrame]:
    """Yield the frames of ``video``."""
    for shade in shades:
        image = Image.new("RGB", size, (shade, shade, shade))
        image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1]))
        yield av.VideoFrame.from_image(image)
