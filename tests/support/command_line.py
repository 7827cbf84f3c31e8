"""What a command of ``cocoa-embed`` prints, for the fixture ``command``, and which modules it imports."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Result(NamedTuple):
    """The exit status of a command, and what it printed on standard output and standard error."""

    status: int
    out: str
    err: str

    def document(self) -> dict[str, Any]:
        """Return the JSON document of a command that succeeded."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    def error(self) -> str:
        """Return the message of a command that failed: one sentence on standard error, and nothing else."""
        assert (self.status in (1, 2), self.out) == (True, "")
        line = self.err.splitlines()[-1]
        assert line.startswith("cocoa-embed: ")
        assert "Traceback" not in self.err
        return f"{self.status} {line.removeprefix('cocoa-embed: ')}"


Command = Callable[..., Result]


def modules_imported_by(statements: str, folder: Path | None = None) -> tuple[Result, set[str]]:
    """Run Python in a fresh process; return what it printed, and the names in its ``sys.modules``."""
    code = (
        f"import sys\nstatus = 0\ntry:\n    {statements}\nexcept SystemExit as end: status = end.code\n"
        "print('\\n', *sys.modules)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    printed, _, modules = done.stdout.rstrip("\n").rpartition("\n")
    return Result(done.returncode, printed, done.stderr), set(modules.split())


def modules_of_command(arguments: list[str], folder: Path) -> tuple[Result, set[str]]:
    """Run ``cocoa-embed`` in a fresh process; return what it printed, and the names in its ``sys.modules``."""
    return modules_imported_by(f"from cocoa_embed.cli.main import main; main({arguments!r})", folder)
