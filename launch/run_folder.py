"""The folder of a run: what was asked for, the log, the checkpoints. Evaluation needs nothing else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch import checkpoint
from launch.errors import RunFailed, UserError
from launch.processes import alone
from launch.runlog import read_log
from model.errors import RecipeError, reason
from model.recipe import Recipe
from pipeline.files import locked, read_plain, sha256_of, write_durably
from pipeline.manifest import FILE_NAME
from pipeline.mean import load_mean


IN_USE = "another process trains there; wait for it, or choose another folder"


@dataclass(frozen=True)
class Run:
    """What makes two runs the same: with these equal, every step of them is."""

    recipe: Recipe
    seed: int
    wnids: list[str]  # the classes, by label
    words: list[str]  # what they are called, "" where nobody says; no part of what makes runs the same
    data: str  # SHA-256 of the manifest of the shards
    mean: str  # SHA-256 of mean.npy

    def __post_init__(self):
        if type(self.seed) is not int or self.seed < 0 or not all(
            isinstance(text, str) for text in (*self.wnids, *self.words, self.data, self.mean)
        ) or len(self.words) != len(self.wnids):
            raise ValueError("not a run's seed, classes and hashes")

    def to_dict(self) -> dict:
        """Return what makes two runs the same, as JSON values."""
        return {"recipe": self.recipe.to_dict(), "seed": self.seed, "wnids": self.wnids, "data": self.data,
                "mean": self.mean}


def _place(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from every other; None where there is none."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


class RunFolder:
    """RUN: run.json, mean.npy, manifest.json and hashed.json (of the shards), log.jsonl, step, checkpoints/,
    tensorboard/."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.log_path = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.step_path = self.path / "step"

    def trace_path(self, tower: int) -> Path:
        return self.path / f"trace-tower{tower}.json"

    def in_use(self) -> bool:
        """Whether another process trains here."""
        if not self.log_path.is_file():
            return False
        try:
            with locked(self.log_path, wait=False):
                return False
        except BlockingIOError:
            return True

    def is_there(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "run.json").is_file()

    def check_new(self) -> None:
        """UserError where the folder holds anything already, but for what a kill during `create` left."""
        left = re.compile(r"mean\.npy|manifest\.json|(mean\.npy|manifest\.json|run\.json)\.[0-9a-f]{8}\.tmp")
        if self.path.exists() and (
            not self.path.is_dir() or not all(left.fullmatch(path.name) or path == self.log_path and
                                              not path.stat().st_size for path in self.path.iterdir())
        ):
            raise UserError(f"{self.path}: holds files already; choose another folder, or --resume a run")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only one who trains here; UserError where another process does. The folder is made if need be."""
        self.path.mkdir(parents=True, exist_ok=True)
        with alone(self.log_path, f"{self.path}: {IN_USE}"):
            self._held = _place(self.log_path)
            yield

    def check_held(self) -> None:
        """RunFailed where the folder that is held is not here any more, but perhaps another run's."""
        if _place(self.log_path) != self._held:
            raise RunFailed(f"{self.path}: removed or renamed while the run went on, which ends here")

    def create(self, run: Run, mean: bytes, manifest: bytes | None = None, job: str | None = None) -> None:
        """Begin a run here, with the bytes of the shards' mean.npy and manifest.json, of the torchrun job `job`."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_durably(self.path / "mean.npy", mean)
        if manifest is not None:
            write_durably(self.path / FILE_NAME, manifest)
        described = {**run.to_dict(), "words": run.words, "job": job}
        write_durably(self.path / "run.json", (json.dumps(described, indent=1) + "\n").encode())

    def hashed(self) -> dict[str, list[int]]:
        """Return the stamps of shards whose hashes were right when this run began; none where they are not known."""
        with suppress(OSError, ValueError, RecursionError):
            stamps = json.loads(read_plain(self.path / "hashed.json"))
            return stamps if isinstance(stamps, dict) else {}
        return {}

    def write_hashed(self, stamps: dict[str, list[int]]) -> None:
        with suppress(OSError):  # a full disk: they are hashed again
            write_durably(self.path / "hashed.json", json.dumps(stamps).encode())

    def read(self) -> Run:
        """UserError where there is no run, or its description is damaged."""
        path = self.path / "run.json"
        try:
            fields = json.loads(read_plain(path))
            wnids = list(fields["wnids"])
            words = list(fields.get("words", [""] * len(wnids)))  # runs of earlier versions have none
            return Run(Recipe.from_dict(fields["recipe"]), fields["seed"], wnids, words, fields["data"], fields["mean"])
        except FileNotFoundError:
            raise UserError(f"{self.path}: no run there (no run.json); start one with `alexnet train`") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({reason(error)}); restore it or train anew") from None

    def begun_by(self, job: str) -> bool:
        """Whether the torchrun job of that name has begun or resumed the run that is here."""
        with suppress(OSError, ValueError, AttributeError, RecursionError):  # what is damaged is told when it is read
            if json.loads(read_plain(self.path / "run.json")).get("job") == job:
                return True
        if not self.is_there() or not self.log_path.is_file():
            return False
        return any(record.get("job") == job for record in read_log(self.log_path))

    def newest_checkpoint(self, run: Run, tell: bool = True) -> Path | None:
        """Return the newest checkpoint that is not damaged, None where there is none yet.

        With `tell`, a line says which were passed over. UserError where it is another run's, or all are damaged.
        """
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise UserError(f"{self.checkpoints}: no folder; move it away, or restore the checkpoints")
        damaged: list[str] = []
        for path in reversed(checkpoint.steps(self.checkpoints)):
            try:
                state = checkpoint.check(path)
            except checkpoint.Damaged as error:
                damaged.append(str(error))
                continue
            self._check_whose(path, state, run)
            for told in damaged if tell else ():
                print(f"alexnet: {told}; taking the one before, {path.name}", file=sys.stderr)
            return path
        if damaged:
            raise UserError(f"{damaged[0]}, and no other checkpoint is there to take; restore it, or train anew in "
                            "another folder")
        return None

    def last_checkpoint(self, run: Run, tell: bool = True) -> Path:
        """Return `newest_checkpoint`. UserError where there is none."""
        newest = self.newest_checkpoint(run, tell)
        if newest is None:
            raise UserError(f"{self.checkpoints}: no checkpoint there yet; train first")
        return newest

    def best_checkpoint(self, run: Run) -> Path:
        """Return the checkpoint with the lowest validation error. UserError where it is not known, or damaged."""
        best = checkpoint.best(self.checkpoints)
        if best is None or not best.is_dir():
            raise UserError(f"{self.checkpoints}: no best checkpoint yet, which is known after the first validation; "
                            "leave out --best")
        self._check_whose(best, checkpoint.check(best), run)
        return best

    def _check_whose(self, path: Path, state: dict, run: Run) -> None:
        with suppress(KeyError, RecipeError):  # of an earlier version it lacks fields, which then have their defaults
            state["recipe"] = Recipe.from_dict(state["recipe"]).to_dict()
        differing = [key for key, value in run.to_dict().items() if state.get(key) != value]
        if differing:
            raise UserError(f"{path}: a checkpoint of another run ({', '.join(differing)} differ from "
                            f"{self.path / 'run.json'}); remove it, or restore run.json")

    def mean(self, run: Run) -> np.ndarray:
        """Return the training set's mean image, float32 [256, 256, 3]. UserError where it has changed, DataError where
        it is none."""
        path = self.path / "mean.npy"
        if not path.is_file() or sha256_of(path) != run.mean:
            raise UserError(f"{path}: missing or changed since the training; copy it from the shards")
        return load_mean(path)
