"""A model on several devices gives what it gives on one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from exported import write_checkpoint
from PIL import Image
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.encode.devices import DeviceEncoder, cut, read_devices
from cocoa_embed.encode.jobs import EmbeddedImage
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, ImageError, UsageError
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import export_model


@pytest.fixture(scope="module")
def model(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    return export_model(write_checkpoint(backbone, folder / "run"), folder / "model")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every process have one thread: sums of several depend on how they are split."""
    monkeypatch.setattr("cocoa_embed.encode.devices.available_cores", lambda: 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    """Images of several sizes, and one that is none."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    found = []
    for number in range(21):
        pixels = random.integers(0, 255, (28 * (1 + number % 3), 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        found.append((f"{number}.png", (folder / f"{number}.png").read_bytes()))
    found.insert(5, ("none.png", b"no image"))
    return found


def test_the_devices_of_a_list_are_its_names() -> None:
    assert read_devices("cuda:0, cpu,cpu") == ["cuda:0", "cpu", "cpu"]
    with pytest.raises(UsageError, match="names no available device"):
        read_devices(" ,")


def test_chunks_depend_on_the_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cocoa_embed.encode.devices.CHUNK_BYTES", 10)
    sizes = [1, 1, 1, 1, 20, 1, 6, 6, 1]
    chunks = list(cut(((str(number), b"x" * size) for number, size in enumerate(sizes)), 3))
    assert [[key for key, _ in chunk] for chunk in chunks] == [["0", "1", "2"], ["3", "4"], ["5", "6", "7"], ["8"]]


def test_two_processes_give_the_embeddings_of_one_in_the_order_of_the_images(
    model: Path, images: list[tuple[str, bytes]]
) -> None:
    one, two = DeviceEncoder(model, ["cpu"]), DeviceEncoder(model, ["cpu", "cpu"], workers=1)
    alone = load_encoder(model, "cpu")
    assert (two.fingerprint, two.dimension, two.name) == (alone.fingerprint, alone.dimension, str(model))
    found = [list(encoder.stream_images(images, batch_size=2)) for encoder in (one, two, alone)]
    for outcomes in found:
        assert [key for key, _ in outcomes] == [name for name, _ in images]
    for (name, first), (_, second), (_, third) in zip(*found, strict=True):
        if name == "none.png":
            assert isinstance(second, ImageError)
            assert str(first) == str(second) == str(third)
            assert second.source == name
        else:
            assert isinstance(first, EmbeddedImage)
            assert isinstance(second, EmbeddedImage)
            assert isinstance(third, EmbeddedImage)
            assert np.array_equal(first.vector, second.vector)
            np.testing.assert_allclose(second.vector, third.vector, atol=1e-5)
    short = [outcome.vector for _, outcome in two.truncate(8).stream_images(images[:2]) if outcome]  # type: ignore[union-attr]
    assert [vector.shape for vector in short] == [(8,), (8,)]
    np.testing.assert_allclose(
        two.embed_queries([{"text": "a red ring"}]), alone.embed_queries([{"text": "a red ring"}]), atol=1e-5
    )

    def broken() -> Iterator[tuple[str, bytes]]:
        yield from images[:5]
        raise RuntimeError("the list broke")

    for encoder in (one, two, alone):
        stream = encoder.stream_images(broken(), batch_size=2)
        assert [key for key, _ in islice(stream, 5)] == [name for name, _ in images[:5]]
        with pytest.raises(RuntimeError, match="the list broke"):
            next(stream)
    for encoder in (one, two):
        encoder.close()


def test_a_process_that_dies_is_reported_in_one_sentence_and_the_next_run_starts_it_again(
    model: Path, images: list[tuple[str, bytes]]
) -> None:
    encoder = DeviceEncoder(model, ["cpu"])
    stream = encoder.stream_images(images * 20, batch_size=1)
    next(stream)
    os.kill(encoder.processes.lanes[0].process.pid, signal.SIGKILL)
    with pytest.raises(CocoaError, match=r"the process for cpu ended \(exit status (-9|255)\)"):
        list(stream)
    assert len(list(encoder.stream_images(images))) == len(images)
    encoder.close()


def test_an_abandoned_stream_ends_the_processes(model: Path, images: list[tuple[str, bytes]]) -> None:
    encoder = DeviceEncoder(model, ["cpu"])
    stream = encoder.stream_images(images * 50, batch_size=1)
    next(stream)
    process = encoder.processes.lanes[0].process
    started = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert not process.is_alive()
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_what_the_fork_server_imports_asks_nothing_of_cuda() -> None:
    """A process that is forked after a question to CUDA cannot use it."""
    code = (
        "import torch, sys\nasked = []\n"
        "torch._C._cuda_getDeviceCount = lambda: asked.append(1) or 0\n"
        "import cocoa_embed.encode.devices, sentence_transformers\n"
        "before = len(asked); torch.cuda.is_available(); sys.exit(before or not asked)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_model_that_cannot_be_loaded_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match="there is no such model folder"):
        DeviceEncoder(tmp_path / "nowhere", ["cpu"]).require_images()


def test_a_device_that_is_not_there_is_wrong_usage(model: Path) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        DeviceEncoder(model, ["cpu", "cuda:77"]).embed_queries([{"text": "a red ring"}])
