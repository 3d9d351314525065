"""Commands of ours beside one another: started by one of ours, or kept out of a folder by one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launch.errors import UserError
from launch.facts import ROOT
from pipeline.files import locked

# Killed with this process: nothing trains or measures on behind its back.
_PROGRAM = "from launch.environment import die_with_parent; die_with_parent({}); from {} import main; main()"


def alexnet(processes: int, *words: str | Path, stderr: int | None = None) -> subprocess.CompletedProcess:
    """Run `alexnet WORDS`, under torchrun where there are several processes; keep what it prints on stdout.

    It runs in the project's folder, for Python would import what lies in the user's: paths must be absolute. `stderr`
    as in subprocess.run: None lets it through.
    """
    torchrun = ["--standalone", "--nproc-per-node", str(processes), "-m", "launch.cli"] if processes > 1 else []
    program = ending_with_us("launch.torchrun" if processes > 1 else "launch.cli")
    return subprocess.run([*program, *torchrun, *map(str, words)], stdout=subprocess.PIPE, stderr=stderr, text=True,
                          cwd=ROOT)


def ending_with_us(module: str) -> list[str]:
    """Return the command that runs `main` of a module of ours, in a process that ends with this one."""
    return [sys.executable, "-c", _PROGRAM.format(os.getpid(), module)]


@contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock while the block runs; where another process holds it, a UserError that says `otherwise`."""
    with ExitStack() as stack:
        try:  # around no more than this: what the block raises is its own
            stack.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            raise UserError(otherwise) from None
        yield
