"""The log of a run: JSON lines, the first of which says what was run, where and with what."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from torch import Tensor

from model.exchange import Exchange
from pipeline.loader import TrainingLoader


class RunLog:
    """Appends records to `path`. Only rank 0 holds one; `RunLog(None)` keeps nothing."""

    def __init__(self, path: Path | None):
        self._file = open(path, "a+b") if path else None
        if self._file and self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read() != b"\n":  # a kill cut the last line short: what follows is not to be lost with it
                self._file.write(b"\n")

    def write(self, event: str, **fields) -> None:
        if self._file:
            record = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields}
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()


class Interval:
    """Sums over the steps between two lines of the log. Its clock starts when it is made."""

    def __init__(self, loader: TrainingLoader, exchange: Exchange | None):
        self.loader, self.exchange = loader, exchange
        self.steps, self.images, self.loss, self.right = 0, 0, 0.0, 0
        self.began, self.waits_before = time.perf_counter(), self._waits()

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        self.steps += 1
        self.images += images
        self.loss = self.loss + loss  # tensors: on a GPU nothing waits for them here
        self.right = self.right + right

    def figures(self) -> dict:
        """Return the log's figures: means over the images, shares (0-1) of the time. Sets `seconds`."""
        loss, right = float(self.loss) / self.steps, int(self.right)
        self.seconds = time.perf_counter() - self.began
        data, peer = (now - before for now, before in zip(self._waits(), self.waits_before))
        return {"loss": loss, "train_top1_error": 1 - right / self.images, "images_per_s": self.images / self.seconds,
                "waiting_for_data": data / self.seconds, "waiting_for_peer": peer / self.seconds}

    def _waits(self) -> tuple[float, float]:
        return self.loader.wait_s, self.exchange.waited_s if self.exchange else 0.0


def read_log(path: Path) -> list[dict]:
    """Return the records. A last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
