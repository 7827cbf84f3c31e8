"""The command for a card says so on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run_script(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_the_gpu_script_stops_with_a_message_without_a_card(tmp_path: Path) -> None:
    done = run_script(str(tmp_path / "results"))
    assert done.returncode == 1
    assert "no NVIDIA card here" in done.stderr
    assert not (tmp_path / "results").exists()


def test_the_gpu_script_prints_its_usage_without_a_folder() -> None:
    done = run_script()
    assert done.returncode != 0
    assert "usage: benchmarks/gpu.sh FOLDER" in done.stderr
