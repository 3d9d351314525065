"""The log of a run: JSON lines, the first of which says what was run, where and with what."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from model.errors import reason


class RunLog:
    """Appends records to `path`, and tells them to `also`. Only rank 0 holds one; `RunLog(None)` keeps nothing.

    A log that cannot be written, of a full disk, does not end a training: it is said once, and lines are missing.
    """

    def __init__(self, path: Path | None, also: Callable[[str, dict], None] = lambda event, fields: None):
        self._also = also
        self._file = open(path, "a+b", buffering=0) if path else None
        self._cut = False  # whether the last line may be: what follows is not to be lost with it
        self._told = False
        if self._file and self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            self._cut = self._file.read() != b"\n"  # by a kill

    def write(self, event: str, **fields) -> None:
        if self._file:
            record = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields}
            line = b"\n" * self._cut + json.dumps(record).encode() + b"\n"
            try:
                self._cut = self._file.write(line) < len(line)
                self._told = False
            except OSError as error:
                self._cut = True
                if not self._told:
                    print(f"alexnet: {self._file.name}: the log cannot be written ({error.strerror}); its lines are "
                          "lost until that is mended", file=sys.stderr)
                self._told = True
            self._also(event, fields)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()


# What a line that is none of ours leads to, wherever its fields are used.
NOT_OURS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def odd_line(path: Path, error: Exception) -> str:
    return f"{path}: a line of it is not what training writes ({reason(error)}); remove that line"


def read_log(path: Path) -> list[dict]:
    """Return the records; lines that a kill cut short, or that are no records, are left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [record for record in map(record_of, lines) if record is not None]


def record_of(line: str) -> dict | None:
    """Return the record that a line holds, None where it is none."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            return record
    return None


def of_the_run(records: list[dict], event: str) -> list[dict]:
    """Return a log's records of a kind, the steps after a resumed checkpoint once: as they were done last."""
    kept: list[dict] = []
    for record in records:
        if record["event"] == "resume":  # an epoch whose last step it is may be validated anew
            before = record["step"] - record.get("validates", False)
            kept = [one for one in kept if one["step"] <= (before if event == "epoch" else record["step"])]
        elif record["event"] == event:
            kept.append(record)
    return kept
