"""Every kind of hostile file is loaded or refused with a reason, within memory."""

import json
import subprocess
import sys
from pathlib import Path

from hostile_files import write_hostile_files

from cocoa_embed.images.find_files import find_images

SECONDS = 600
"""Ends a test that hangs; all files together usually take one second."""

MEBIBYTES = 150
"""More memory than all files take, the modules included; sixty are usual."""

LOAD_ALL = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
from cocoa_embed.images.load import ImageError, image_size, load_image, read_stable_file
def size_or_error(use, path):
    try:
        return use(path)
    except ImageError as error:
        return str(error)
loaders = lambda path: load_image(path).size, lambda path: image_size(read_stable_file(path).data, path)
results = {path: [size_or_error(use, path) for use in loaders] for path in json.load(sys.stdin)}
# Not ru_maxrss: that begins with what the parent process had.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(json.dumps([results, int(peak[1]) / 1024]))
"""


def test_files_are_found_and_loaded_or_refused_with_a_reason_within_memory(tmp_path: Path) -> None:
    files = write_hostile_files(tmp_path)
    assert find_images([tmp_path]) == sorted(file.path for file in files)
    paths = json.dumps([str(file.path) for file in files])
    command = [sys.executable, "-c", LOAD_ALL]
    done = subprocess.run(command, input=paths, capture_output=True, text=True, timeout=SECONDS, check=True)
    results, mebibytes = json.loads(done.stdout)
    for file in files:
        loaded, header = results[str(file.path)]
        assert isinstance(loaded, list) == file.is_good, (file, loaded)
        if isinstance(loaded, list):
            assert header == loaded, "the header gives the size of the picture"
        else:
            assert file.reason_part in loaded, (file, loaded)
            assert loaded.isprintable()
            assert len(loaded.partition(file.path.name)[2]) < 250, "a short reason follows the file's name"
            assert isinstance(header, str) or min(header) > 0, "pixels that are broken may pass"
    assert mebibytes < MEBIBYTES
