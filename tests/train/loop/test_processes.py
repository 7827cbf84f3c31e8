"""Two processes over gloo take turns, and give up on each other sooner while they train."""

import subprocess
import sys
from pathlib import Path

import pytest

from cocoa_embed.train.loop.processes import taking_turns, training_patience

RUN = """
import datetime, sys, time
from pathlib import Path
from cocoa_embed.train.loop import processes

state, log = processes.meet(), Path("log")
for _ in range(2):
    with processes.taking_turns():
        with log.open("a") as file:
            file.write(f"{state.process_index} begins\\n")
        time.sleep(0.3)
        with log.open("a") as file:
            file.write(f"{state.process_index} ends\\n")
processes.TRAINING_PATIENCE = datetime.timedelta(seconds=1)
with processes.training_patience():
    state.wait_for_everyone()
if state.process_index == 1:
    time.sleep(2)
state.wait_for_everyone()  # outside of training there is time
with processes.training_patience():
    if state.process_index == 1:
        time.sleep(4)
    try:
        state.wait_for_everyone()
    except RuntimeError:
        print("gave up", state.process_index)
"""


@pytest.mark.slow
def test_processes_take_turns_and_give_up_on_one_that_hangs_in_training(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run.py"]
    launched = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "gave up 0" in launched.stdout, launched.stderr[-3000:]
    assert (tmp_path / "log").read_text().splitlines() == ["0 begins", "0 ends", "1 begins", "1 ends"] * 2


def test_a_single_process_does_not_wait() -> None:
    with taking_turns(), training_patience():
        pass
