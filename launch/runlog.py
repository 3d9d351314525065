"""The log of a run: JSON lines, the first of which says what was run, where and with what."""

from __future__ import annotations

import json
import time
from pathlib import Path


class RunLog:
    """Appends records to `path`. Only rank 0 holds one; `RunLog(None)` keeps nothing."""

    def __init__(self, path: Path | None):
        self._file = open(path, "a", encoding="utf-8") if path else None

    def write(self, event: str, **fields) -> None:
        if self._file:
            record = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()


def read_log(path: Path) -> list[dict]:
    """Return the records. A last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
