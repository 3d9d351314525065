"""RUN/step: how far a run has come, to the step, whatever ended it, and how many steps were done twice. A write takes
microseconds: every step has one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pipeline.files import read_plain

WIDTH = 12  # digits


class StepFile:
    """`before` is the step that an earlier part of the run had come to, `repeated` how many were done twice until then.
    Only rank 0 holds one; `StepFile(None)` keeps nothing."""

    def __init__(self, path: Path | None):
        self.before, self.repeated, self._file = 0, 0, None
        if path is not None:
            with suppress(OSError, ValueError):  # damaged: only counts are lost
                self.before, self.repeated = map(int, read_plain(path)[: 2 * WIDTH + 2].split())
            with suppress(OSError):  # of a full disk the log and the checkpoints tell
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)

    def write(self, step: int) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.pwrite(self._file, b"%*d %*d\n" % (WIDTH, step, WIDTH, self.repeated), 0)

    def __enter__(self) -> StepFile:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            os.close(self._file)
