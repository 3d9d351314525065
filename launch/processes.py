"""Commands of ours, started by one of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launch.facts import ROOT

# Killed with this process: nothing trains or measures on behind its back.
_PROGRAM = "from launch.environment import die_with_parent; die_with_parent({}); from {} import main; main()"


def alexnet(processes: int, *words: str | Path, stderr: int | None = None) -> subprocess.CompletedProcess:
    """Run `alexnet WORDS`, under torchrun where there are several processes; keep what it prints on stdout.

    It runs in the project's folder, for Python would import what lies in the user's: paths must be absolute. `stderr`
    as in subprocess.run: None lets it through.
    """
    torchrun = ["--standalone", "--nproc-per-node", str(processes), "-m", "launch.cli"] if processes > 1 else []
    program = _PROGRAM.format(os.getpid(), "launch.torchrun" if processes > 1 else "launch.cli")
    return subprocess.run([sys.executable, "-c", program, *torchrun, *map(str, words)], stdout=subprocess.PIPE,
                          stderr=stderr, text=True, cwd=ROOT)
