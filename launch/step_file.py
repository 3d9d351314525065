"""RUN/step: how far a run has come, to the step, whatever ended it. A write takes microseconds: every step has one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

WIDTH = 12  # digits


class StepFile:
    """`before` is the step that an earlier part of the run had come to. Only rank 0 holds one; `StepFile(None)` keeps
    nothing."""

    def __init__(self, path: Path | None):
        self.before, self._file = 0, None
        if path is not None:
            with suppress(OSError, ValueError):  # damaged: only a count is lost
                self.before = int(path.read_bytes()[:WIDTH])
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def write(self, step: int) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a full disk the log and the checkpoints tell
                os.pwrite(self._file, b"%*d\n" % (WIDTH, step), 0)

    def __enter__(self) -> StepFile:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            os.close(self._file)
