"""Every kind of hostile file is loaded or refused with a reason, within memory."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hostile_files import HostileFile, write_hostile_files

from cocoa_embed.errors import ImageError
from cocoa_embed.images.find_files import find_images
from cocoa_embed.images.load import image_size, read_stable_file

SECONDS = 600
"""Ends a test that hangs; all files together usually take one second."""

MEBIBYTES = 150
"""More memory than all files take, the modules included; sixty are usual."""

LOAD_ALL = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
from cocoa_embed.images.load import ImageError, load_image
results = {}
for path in json.load(sys.stdin):
    try:
        results[path] = load_image(path).size
    except ImageError as error:
        results[path] = str(error)
# Not ru_maxrss: that begins with what the parent process had.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(json.dumps({"results": results, "mebibytes": int(peak[1]) / 1024}))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[HostileFile]:
    return write_hostile_files(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def loaded(files: list[HostileFile]) -> dict[str, Any]:
    """The size or the error of each file, loaded one after the other in another process."""
    paths = json.dumps([str(file.path) for file in files])
    command = [sys.executable, "-c", LOAD_ALL]
    done = subprocess.run(command, input=paths, capture_output=True, text=True, timeout=SECONDS, check=True)
    return json.loads(done.stdout)


def test_good_files_are_loaded_and_bad_ones_refused_with_a_reason_within_memory(
    files: list[HostileFile], loaded: dict[str, Any]
) -> None:
    wrong = {}
    for file in files:
        result = loaded["results"][str(file.path)]
        if isinstance(result, str) == file.is_good or (isinstance(result, str) and file.reason_part not in result):
            wrong[file.kind] = result
        elif isinstance(result, str):
            assert result.isprintable()
            assert len(result.partition(file.path.name)[2]) < 250, "a short reason follows the file's name"
    assert not wrong
    assert loaded["mebibytes"] < MEBIBYTES


def test_a_search_of_the_folder_finds_them_all_and_nothing_else(files: list[HostileFile]) -> None:
    assert find_images([files[0].path.parent]) == sorted(file.path for file in files)


@pytest.mark.filterwarnings("ignore")
def test_the_header_gives_the_size_of_the_picture_or_an_image_error(
    files: list[HostileFile], loaded: dict[str, Any]
) -> None:
    for file in files:
        try:
            size = image_size(read_stable_file(file.path), file.kind)
        except ImageError:
            assert not file.is_good, file.kind
        else:  # pixels that are broken may pass
            assert min(size) > 0, file.kind
            assert not file.is_good or list(size) == loaded["results"][str(file.path)], file.kind
