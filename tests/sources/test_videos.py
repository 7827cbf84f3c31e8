"""A video gives a frame every so many seconds, upright, and says where it is cut off."""

import io
import struct
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from source_files import read, video

from cocoa_embed.sources import videos


def shade(content: bytes) -> int:
    """Return the grey of a frame's right half."""
    pixels = np.asarray(Image.open(BytesIO(content)).convert("L"))
    return round(float(pixels[:, -pixels.shape[1] // 4 :].mean()))


@pytest.mark.parametrize("seek_seconds", [0.5, 100.0])
def test_frames_are_those_of_their_times_whether_the_decoder_jumps_or_not(
    tmp_path: Path, seek_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "SEEK_SECONDS", seek_seconds)
    (tmp_path / "clip.mp4").write_bytes(video(range(0, 240, 2)))
    found = read(tmp_path / "clip.mp4", every=2.5)
    assert [*found.contents] == [f"clip.mp4#t={seconds}" for seconds in (0.0, 2.5, 5.0, 7.5, 10.0)]
    assert found.metadata["clip.mp4#t=2.5"] == {"seconds": 2.5}
    np.testing.assert_allclose([shade(each) for each in found.contents.values()], [0, 50, 100, 150, 200], atol=6)
    assert not found.faults


def test_another_step_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(video([9] * 10))
    versions = [read(tmp_path / "clip.mp4", every=every).versions for every in (1.0, 2.0, 1.0)]
    assert versions[0] == versions[2] != versions[1]


@pytest.mark.parametrize(
    ("matrix", "white"), [((0, 1, -1, 0), "top"), ((0, -1, 1, 0), "bottom"), ((-1, 0, 0, -1), "right")]
)
def test_frames_are_upright(tmp_path: Path, matrix: tuple[int, int, int, int], white: str) -> None:
    content = bytearray(video([0] * 5))
    at = content.index(b"tkhd") + 4 + 40  # version and flags, times, id, duration, layer, volume
    a, b, c, d = matrix
    struct.pack_into(">9i", content, at, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "clip.mp4").write_bytes(content)
    (frame,) = read(tmp_path / "clip.mp4").contents.values()
    pixels = np.asarray(Image.open(BytesIO(frame)).convert("L"))
    assert pixels.shape == ((64, 48) if white in ("top", "bottom") else (48, 64))
    height, width = pixels.shape
    halves = {"top": pixels[: height // 3], "bottom": pixels[-height // 3 :], "right": pixels[:, -width // 3 :]}
    assert halves[white].mean() > 200
    assert pixels.mean() < 160


def test_a_file_without_a_video_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        for start in range(0, 8192, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "song.mp4").write_bytes(buffer.getvalue())
    assert read(tmp_path / "song.mp4").faults == [f"{tmp_path / 'song.mp4'}: has no video (it has audio)"]


def test_a_truncated_video_is_reported_after_its_good_frames(tmp_path: Path) -> None:
    whole = video(range(200), suffix="matroska")
    (tmp_path / "clip.mkv").write_bytes(whole)
    assert len(read(tmp_path / "clip.mkv", every=1.0).contents) == 20
    (tmp_path / "short.mp4").write_bytes(video(range(50))[:500])
    assert "short.mp4: cannot be read" in read(tmp_path / "short.mp4").faults[0]
    content = video(range(200))
    place = content.index(b"mdat") + 4
    size = content.index(b"moov") - place
    (tmp_path / "clip.mp4").write_bytes(
        content[: place + size // 2] + bytes(size - size // 2) + content[place + size :]
    )
    found = read(tmp_path / "clip.mp4", every=1.0)
    assert 0 < len(found.contents) < 20
    assert "clip.mp4: cannot be read after" in found.faults[0]
