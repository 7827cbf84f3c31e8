"""Frames of videos, taken at regular intervals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from cocoa_embed.data.places import open_binary
from cocoa_embed.errors import ImageError, printable
from cocoa_embed.images.load import check_pixels
from cocoa_embed.sources.base import Record
from cocoa_embed.sources.shard_files import Kind, ShardFile, give

if TYPE_CHECKING:
    import av
    import av.container

SEEK_SECONDS = 10.0
"""With longer steps, the decoder jumps to the key frame before the next step instead of decoding all frames between."""

JPEG_QUALITY = 95


def read_frames(file: ShardFile) -> Iterator[Record]:
    """Yield a frame every ``options.every`` seconds, the first frame first, named by its time.

    :raises ImageError: If the file has no video, or no frame can be decoded.
    :raises Exception: If it cannot be decoded to its end.
    """
    import av

    seconds = None
    with open_binary(file.place) as opened, av.open(opened) as container:
        stream = video_stream(container, file.key)
        for seconds, frame in sampled_frames(container, stream, file.options.every):
            name = f"t={seconds}"
            yield file.make_record(name, as_jpeg(frame, stream, f"{file.key}#{name}"), {"seconds": seconds})
    if seconds is None:
        raise ImageError(file.key, "has no frame that can be decoded")


def video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """Return the video of a file.

    :raises ImageError: If it has none; a cover picture does not count.
    """
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise ImageError(name, f"has no video (it has {kinds})")


def sampled_frames(
    container: av.container.InputContainer, stream: av.VideoStream, every: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield the first frame at or after each step, with its time from the start of the video in seconds.

    :raises Exception: If the video cannot be decoded to its end.
    """
    time_base = stream.time_base or Fraction(1, 1)
    start = (stream.start_time or 0) * time_base
    step, last = 0, None
    while True:
        for frame in container.decode(stream):
            seconds = float((frame.pts or 0) * time_base - start)
            if last is not None and seconds <= last:  # decoded a second time, after a jump
                continue
            last = seconds
            if seconds >= step * every - 1e-6:
                yield round(seconds, 3), frame
                step = int((seconds + 1e-6) // every) + 1
                if every >= SEEK_SECONDS and seconds + SEEK_SECONDS < step * every:
                    break
        else:
            break
        container.seek(int((start + Fraction(step * every)) / time_base), stream=stream)
    missing = 0.0 if stream.duration is None else float(stream.duration * time_base) - (last or 0.0)
    if missing > max(1.0, every) and step * every < float((stream.duration or 0) * time_base):
        raise EOFError(f"it is cut off {missing:.1f} s before its end")


def read_frame(opened: BinaryIO, file: str, name: str) -> bytes:
    """Return one frame as the bytes of a JPEG file; decoding starts at the key frame before it.

    :param name: ``t=12.0``.
    :raises ImageError: If there is no such frame.
    """
    import av

    key = printable(f"{file}#{name}")
    digits = re.fullmatch(r"t=(\d+(\.\d+)?)", name)
    if digits is not None:
        wanted = float(digits[1])
        with av.open(opened) as container:
            stream = video_stream(container, file)
            time_base = stream.time_base or Fraction(1, 1)
            start = (stream.start_time or 0) * time_base
            for target in (wanted, 0.0):  # from the start if the file's index leads past the frame
                container.seek(int((float(start) + target) / time_base), stream=stream)
                for frame in container.decode(stream):
                    seconds = round(float((frame.pts or 0) * time_base - start), 3)
                    if seconds == wanted:
                        return give(as_jpeg(frame, stream, key))
                    if seconds > wanted:
                        break
    raise ImageError(key, "is not a frame of the video")


def as_jpeg(frame: av.VideoFrame, stream: av.VideoStream, name: str) -> bytes | ImageError:
    """Return a frame as the bytes of a JPEG file, upright and with square pixels, or its error."""
    try:
        check_pixels(frame.width, frame.height, name)
        image: Image.Image = frame.to_image()
        if (aspect := stream.sample_aspect_ratio) and aspect != 1:
            image = image.resize((max(1, round(image.width * aspect)), image.height))
        if frame.rotation:
            image = image.rotate(frame.rotation, expand=True)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()
    except ImageError as error:
        return error


KIND = Kind(
    "video",
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".mts", ".m2ts", ".3gp", ".ogv"),
    read_frames,
    "av",
    "video",
    settings=("every",),
    read_one=read_frame,
)
