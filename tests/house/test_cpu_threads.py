import os
import subprocess
import sys

import pytest

from cocoa_embed.cpu_threads import SPIN_COUNT

COMMAND_LINE = "from cocoa_embed.cli.main import main\ntry: main(['--version'])\nexcept SystemExit: pass"
# Without an extra the import ends before it loads torch, which takes a while.
LIBRARY = "import sys\nsys.modules['accelerate'] = None\ntry: import cocoa_embed.train\nexcept Exception: pass"
AFTER_TORCH = "import sys\nsys.modules['torch'] = None\nfrom cocoa_embed.cpu_threads import *\nlimit_spinning()"


@pytest.mark.parametrize(
    ("statement", "given", "spin_count"),
    [
        (COMMAND_LINE, {}, SPIN_COUNT),
        (LIBRARY, {}, SPIN_COUNT),
        (COMMAND_LINE, {"GOMP_SPINCOUNT": "7"}, "7"),
        (COMMAND_LINE, {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        (AFTER_TORCH, {}, "None"),
    ],
)
def test_spinning_is_limited_before_torch_is_imported_unless_the_user_sets_it(
    statement: str, given: dict[str, str], spin_count: str
) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", f"{statement}\nimport os\nprint(os.environ.get('GOMP_SPINCOUNT'))"]
    done = subprocess.run(command, env={**clean, **given}, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == spin_count
