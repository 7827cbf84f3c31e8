"""What happens to a store in a folder: other processes that are killed, fill the disk or come second."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_points import DIMENSION, SIGNATURE, make_vector, name

from cocoa_embed.integrations.qdrant.stores.base import Store, open_store

BATCH = 7
OPEN = """
import os, sys
sys.path.insert(0, {tests!r})
from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.stores.base import open_store
from store_points import SIGNATURE, make_points, name
store = open_store(**{{{place!r}: {path!r}}}, collection="images")
os.write(1, b"begun\\n")
"""
CREATE = """
if store.signature() is None:
    store.create(SIGNATURE)
"""
UPSERT_FOR_EVER = """
while True:
    store.upsert(make_points({start}, {start} + {batch}, text="x" * 3000))
    os.write(1, b"%d\\n" % ({start} + {batch}))
    {start} += {batch}
"""


def start_process(place: str, path: Path, code: str) -> subprocess.Popen[bytes]:
    """Run code in another process, over a store that it calls ``store``; what it writes can be read."""
    source = OPEN.format(tests=str(Path(__file__).parent), place=place, path=str(path)) + code
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def run_process(place: str, path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in another process to its end."""
    process = start_process(place, path, code)
    out, err = process.communicate(timeout=300)
    lines = out.decode().removeprefix("begun\n")
    return subprocess.CompletedProcess(process.args, process.returncode, lines, err.decode())


def run_and_kill(place: str, path: Path, start: int, seconds: float) -> int:
    """Upsert in another process until it is killed, ``seconds`` after it begins to open or create the store.

    :return: The number up to which it had said that points are stored.
    """
    code = CREATE + f"start = {start}" + UPSERT_FOR_EVER.format(start="start", batch=BATCH)
    process = start_process(place, path, code)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    told = out.split()
    return int(told[-1]) if told else start


def check_after_kill(place: str, path: Path, stored: int) -> int:
    """Check that a store whose writer was killed holds what that had said it does; return the number of its points."""
    store = open_folder(place, path)
    signature = store.signature()
    if signature is None:
        assert stored == 0
        return 0
    assert signature == SIGNATURE
    numbers = sorted(payload["number"] for _, payload in store.scan(["number"]))
    assert numbers == list(range(len(numbers)))
    assert stored <= len(numbers) == store.count() <= stored + BATCH
    for number in numbers[-10:]:
        assert store.search(make_vector(number, DIMENSION), limit=1)[0].id == name(number)
    store.close()
    return len(numbers)


def open_folder(place: str, path: Path, collection: str = "images") -> Store:
    return open_store(**{place: path}, collection=collection)  # type: ignore[arg-type]


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of its own, in memory, that is full soon; where one cannot be had, the test is skipped."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def set_disk(folder: Path, option: str) -> None:
    """Change a small disk: ``size=100m``, ``ro``, ``rw``."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)
