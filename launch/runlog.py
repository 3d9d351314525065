"""The log of a run: JSON lines, the first of which says what was run, where and with what."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from launch.errors import RunFailed
from model.errors import reason
from model.exchange import Exchange
from pipeline.loader import TrainingLoader


class RunLog:
    """Appends records to `path`. Only rank 0 holds one; `RunLog(None)` keeps nothing."""

    def __init__(self, path: Path | None):
        self._file = open(path, "a+b", buffering=0) if path else None
        if self._file and self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read() != b"\n":  # a kill cut the last line short: what follows is not to be lost with it
                self._file.write(b"\n")

    def write(self, event: str, **fields) -> None:
        if self._file:
            record = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields}
            try:
                self._file.write(json.dumps(record).encode() + b"\n")
            except OSError as error:
                raise RunFailed(f"{self._file.name}: the log cannot be written ({error.strerror}); mend that and go "
                                "on with --resume") from None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()


class Interval:
    """Sums over the steps between two lines of the log. Its clock starts when it is made."""

    def __init__(self, loader: TrainingLoader, exchange: Exchange | None):
        self.loader, self.exchange = loader, exchange
        self.steps, self.images, self.loss, self.right = 0, 0, torch.zeros(()), 0
        self.peer_waited_s = 0.0  # how long the other tower waited for this one
        self.began, self.waits_before = time.perf_counter(), self._waits()

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        self.steps += 1
        self.images += images
        self.loss = self.loss + loss  # tensors: on a GPU nothing waits for them here
        self.right = self.right + right

    def figures(self) -> dict:
        """Return the log's figures: means over the images, shares (0-1) of the time. Sets `seconds`.

        Of the two towers' waits for each other it is the longer one that counts.
        """
        loss, right = float(self.loss) / self.steps, int(self.right)
        self.seconds = time.perf_counter() - self.began
        data, peer = self._waits()[0] - self.waits_before[0], max(self.waited_for_peer_s(), self.peer_waited_s)
        return {"loss": loss, "train_top1_error": 1 - right / self.images, "images_per_s": self.images / self.seconds,
                "waiting_for_data": data / self.seconds, "waiting_for_peer": peer / self.seconds}

    def waited_for_peer_s(self) -> float:
        return self._waits()[1] - self.waits_before[1]

    def _waits(self) -> tuple[float, float]:
        return self.loader.wait_s, self.exchange.waited_s if self.exchange else 0.0


# What a line that is none of ours leads to, wherever its fields are used.
NOT_OURS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def odd_line(path: Path, error: Exception) -> str:
    return f"{path}: a line of it is not what training writes ({reason(error)}); remove that line"


def read_log(path: Path) -> list[dict]:
    """Return the records; lines that a kill cut short, or that are no records, are left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("event"), str):
                records.append(record)
    return records


def of_the_run(records: list[dict], event: str) -> list[dict]:
    """Return a log's records of a kind, the steps after a resumed checkpoint once: as they were done last."""
    kept: list[dict] = []
    for record in records:
        if record["event"] == "resume":
            kept = [one for one in kept if one["step"] <= record["step"]]
        elif record["event"] == event:
            kept.append(record)
    return kept
