"""Follows a run by its log alone, from any machine that sees it: how far it is, how fast, and whether it goes on."""

from __future__ import annotations

import calendar
import shutil
import statistics
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from launch.errors import UserError, printable
from launch.runlog import record_of

LATEST = 20  # lines of the log, over which speed is taken
STOPPED_S = 60
PATIENCE_S, PATIENCE = 60, 5  # silent: so many seconds and so many times the longest of the latest gaps
LOOK_S = 1.0  # how often the log is looked at
LONGEST = 1 << 22  # bytes of a record
REMEMBERED = 200  # bytes by which a file is known to be still the same
FIGURES = {  # of the steps, and how they are shown
    "loss": "loss {:.3f}", "train_top1_error": "training error {:.2%}", "images_per_s": "{:,.0f} images/s",
    "memory_gib": "{:.1f} GiB",
}
NOT_TRAINING = ("import", "evaluation")  # what other commands write into the log


class Progress:
    """What a log says so far: `add` its records in their order. What a damaged one lacks is None."""

    def __init__(self):
        self.state = None  # running, ended, stopped, failed; None: nothing has begun
        self.reason = self.last = self.val_epoch = self.checkpoint_step = None
        self.step, self.resumes, self.repeated = 0, 0, 0
        self.total = self.epochs = self.batch = self.images = self.steps_per_epoch = self.validation_s = None
        self.figures: dict[str, float | None] = dict.fromkeys(FIGURES)
        self.val: dict[str, float | None] = {"top1": None, "top5": None}
        self._image_s: deque[float] = deque(maxlen=LATEST)
        self._gaps_s: deque[float] = deque(maxlen=LATEST)

    def add(self, record: dict) -> None:
        event, step = record["event"], _number(record, "step")
        if event in NOT_TRAINING:
            return
        step = self.step if step is None else step
        begun, self.last = self.last is not None, record
        if event in ("start", "resume", "steps"):
            self.state, self.reason = "running", None
        if event in ("start", "resume"):
            if begun:
                self.resumes += 1
                repeats = _number(record, "repeats")  # earlier versions did not count
                self.repeated += max(0, self.step - step) if repeats is None else repeats
            self.step = step
            self.checkpoint_step = step or None  # from which it goes on
            self._gaps_s.clear()
            recipe = record.get("recipe")
            self.epochs, self.batch = _number(recipe, "epochs"), _number(recipe, "batch")
            self.images, self.steps_per_epoch = _number(record, "images"), _number(record, "steps_per_epoch")
            self.total = _number(record, "stop") or (self.epochs or 0) * (self.steps_per_epoch or 0) or None
        elif event == "steps":
            self.figures = {name: _number(record, name) for name in FIGURES}
            if self.figures["images_per_s"]:
                self._image_s.append(1 / self.figures["images_per_s"])
                self._gaps_s.append((step - self.step) * (self.batch or 0) * self._image_s[-1])
            self.step = step
        elif event == "epoch":
            self.val = {name: _number(record.get("val"), name) for name in self.val}
            self.val_epoch, self.validation_s = _number(record, "epoch"), _number(record, "validation_s")
        elif event == "checkpoint":
            self.checkpoint_step = step
        elif event in ("end", "stopped", "failed"):
            self.state, self.step = "ended" if event == "end" else event, step
            self.reason = printable(str(record["reason"])) if "reason" in record else None

    def epoch(self) -> float | None:
        return self.step / self.steps_per_epoch if self.steps_per_epoch else None

    def left_s(self) -> float | None:
        """Return how long it goes on at the latest speed, with validations; None where that is not known."""
        if self.state != "running" or not (self._image_s and self.total and self.batch):
            return None
        steps = max(0, self.total - self.step)
        epochs = steps / self.steps_per_epoch if self.steps_per_epoch else 0
        return steps * self.batch * statistics.median(self._image_s) + epochs * (self.validation_s or 0)

    def patience_s(self) -> float:
        """Return how long the log may be silent before that is odd."""
        gaps = [*self._gaps_s, self.validation_s or 0]
        if not self._gaps_s:
            gaps.append(PATIENCE_S)  # the first step is longer than others
        if self.validation_s is None and self._image_s:  # the first validation: shorter than an epoch
            gaps.append((self.images or 0) * self._image_s[-1] / PATIENCE)
        return PATIENCE_S + PATIENCE * max(gaps)


class Watch:
    """A log that grows, read once, and how long ago it grew."""

    def __init__(self, run: Path):
        """UserError where nothing has been trained."""
        self.run, self._path = run, run / "log.jsonl"
        if not self._path.is_file():
            raise UserError(f"{run}: no run there (no log.jsonl); start one with `alexnet train`")
        self._begin()
        self._read()
        if self.progress.state is None:
            raise UserError(f"{self._path}: nothing has been trained there yet; look again once a run has begun")
        # Of what was written before there is only the time by the clock of the machine that trains.
        self._age_s, self._heard = _since(self.progress.last), time.monotonic()

    def look(self) -> bool:
        """Read what the log has been given since; return whether that is anything."""
        before = self.progress.last
        with suppress(OSError):  # away for the moment, as network folders are: it is silent then
            self._read()
        if self.progress.last in (before, None):
            return False
        self._age_s, self._heard = 0.0, time.monotonic()
        return True

    def _begin(self) -> None:
        self.progress, self._offset, self._end, self._rest = Progress(), 0, b"", b""

    def _read(self) -> None:
        with open(self._path, "rb") as file:
            file.seek(self._offset - len(self._end))
            if file.read(len(self._end)) != self._end:  # shorter than it was, or another
                self._begin()
                file.seek(0)
            while block := file.read(1 << 20):
                self._offset += len(block)
                self._end = (self._end + block)[-REMEMBERED:]
                *lines, self._rest = (self._rest + block).split(b"\n")
                if len(self._rest) > LONGEST:  # no record: the rest of it is not read as one either
                    self._rest = self._rest[: LONGEST + 1]
                for line in lines:
                    record = record_of(line.decode(errors="replace")) if len(line) <= LONGEST else None
                    if record is not None:
                        self.progress.add(record)

    def age_s(self) -> float:
        """Return how long ago the last record was written."""
        return self._age_s + time.monotonic() - self._heard

    def state(self) -> str:
        """running, silent, ended, stopped or failed; none while a log that was cut says nothing."""
        silent = self.progress.state == "running" and self.age_s() > self.progress.patience_s()
        return "silent" if silent else self.progress.state or "none"

    def to_dict(self) -> dict:
        """Return what there is to say as JSON values: errors are shares, 0-1, `left_s` and `age_s` seconds."""
        seen = self.progress
        return {"run": str(self.run), "state": self.state(), "reason": seen.reason, "step": seen.step,
                "total_steps": seen.total, "epoch": seen.epoch(), "epochs": seen.epochs, **seen.figures,
                "left_s": seen.left_s(), "val_epoch": seen.val_epoch, "val_top1_error": seen.val["top1"],
                "val_top5_error": seen.val["top5"], "checkpoint_step": seen.checkpoint_step,
                "age_s": round(self.age_s(), 1), "resumes": seen.resumes, "repeated_steps": seen.repeated}

    def line(self) -> str:
        """Return the same in a line for people."""
        seen, state = self.progress, self.state()
        age, left = _duration(self.age_s()), seen.left_s()
        parts = [{"silent": f"silent for {age}", "failed": f"failed ({seen.reason})", "none": "the log is empty"}.get(
            state, state)]
        parts.append(f"step {seen.step:,}" + (f" of {seen.total:,}" if seen.total else ""))
        if seen.epoch() is not None:
            parts.append(f"epoch {seen.epoch():.2f}" + (f" of {seen.epochs}" if seen.epochs else ""))
        if left is not None:
            parts.append(f"{_duration(left)} left")
        parts += [shown.format(seen.figures[name]) for name, shown in FIGURES.items() if seen.figures[name] is not None]
        if None not in seen.val.values():
            parts.append(f"validation top-1 {seen.val['top1']:.2%}, top-5 {seen.val['top5']:.2%}")
        if seen.checkpoint_step is not None:
            parts.append(f"checkpoint at step {seen.checkpoint_step:,}")
        if seen.resumes:
            times = "once" if seen.resumes == 1 else f"{seen.resumes} times"
            parts.append(f"resumed {times}, {seen.repeated:,} steps done again")
        if state == "running":
            parts.append(f"heard of {age} ago")
        return ", ".join(parts)


def follow(watch: Watch, out: TextIO) -> str:
    """Write to `out` until the run ends, is stopped or fails, which is returned.

    One that is stopped may be started anew by torchrun: it is over when it stays so for STOPPED_S. On a terminal one
    line is refreshed, elsewhere there is another whenever the log says something new.
    """
    refreshed, told = out.isatty(), None
    while True:
        state = watch.state()
        over = state in ("ended", "failed") or state == "stopped" and watch.age_s() > STOPPED_S
        if refreshed:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + (watch.line() if over else watch.line()[:width]).ljust(width), end="", file=out, flush=True)
        elif state != told:
            print(watch.line(), file=out, flush=True)
        if over:
            if refreshed:
                print(file=out)
            return state
        time.sleep(LOOK_S)
        told = None if watch.look() else state


def _number(fields: object, name: str) -> int | float | None:
    value = fields.get(name) if isinstance(fields, dict) else None
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e15
    return value if usable else None


def _since(record: dict) -> float:
    """Return how long ago a record was written; 0 where the clocks of two machines say that it is still to come."""
    try:
        written = calendar.timegm(time.strptime(str(record.get("time")), "%Y-%m-%dT%H:%M:%SZ"))
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, time.time() - written)


def _duration(seconds: float) -> str:
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if seconds >= length:
            return f"{seconds // length:,.0f} {unit} {seconds % length // part:.0f} {smaller}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
