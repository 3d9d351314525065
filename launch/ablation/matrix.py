"""Train and evaluate every run of the matrix, each under a torchrun of its own, and go on where a run was stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.ablation.table import BASE, Outcome, write_table
from launch.environment import rank_and_size
from launch.errors import RunFailed, UserError
from launch.processes import alexnet, alone
from model.ablations import ABLATIONS, ablated
from model.recipe import recipe_named
from pipeline.files import TEMPORARY, write_durably
from pipeline.manifest import load_manifest


@dataclass(frozen=True)
class Matrix:
    """What all runs have in common."""

    recipe: str
    epochs: int  # equally for all
    data: str  # SHA-256 of the manifest of the shards

    def write_or_compare(self, path: Path) -> None:
        """UserError where `path` is of another matrix."""
        mine = {"recipe": self.recipe, "epochs": self.epochs, "data": self.data}
        try:
            theirs = json.loads(path.read_bytes())
        except FileNotFoundError:
            write_durably(path, (json.dumps(mine, indent=1) + "\n").encode())
            return
        except (ValueError, RecursionError):
            raise UserError(f"{path}: damaged; restore it, or choose another folder") from None
        if not isinstance(theirs, dict) or theirs.keys() != mine.keys():
            raise UserError(f"{path}: damaged; restore it, or choose another folder")
        if differing := [f"{key} {theirs[key]}" for key in mine if theirs[key] != mine[key]]:
            raise UserError(f"{path.parent}: begun with {', '.join(differing)}; choose another folder")


def run_matrix(shards: Path, out: Path, recipe: str, epochs: int | None, only: Sequence[str], seeds: int,
               processes: int, options: Sequence[str]) -> Path:
    """Run `recipe` itself and its ablations `only` (none: all), each with `seeds` seeds; return the table's path.

    A run has `processes` processes, or one where it has one tower, and `options` of `alexnet train` that say how. The
    table and the picture are there after the first run and complete after the last. Raises UserError for unknown names
    or another matrix's folder, DataError for unfit shards, RunFailed where a run fails.
    """
    shards, out = shards.absolute(), out.absolute()
    if rank_and_size()[1] > 1:
        raise UserError("a matrix starts torchrun itself, for every run: start it without torchrun")
    base = recipe_named(recipe)
    names = [BASE, *(name for name in ABLATIONS if not only or name in only)]
    for name in only:
        ablated(base, name)  # RecipeError where there is none of that name
    _, data = load_manifest(shards)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; choose another one")
    held = [path.name for path in out.iterdir() if path.suffix != TEMPORARY] if out.is_dir() else []
    if held and "matrix.json" not in held:
        raise UserError(f"{out}: holds files already, and no matrix of ablations; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    Matrix(recipe, epochs or base.epochs, data).write_or_compare(out / "matrix.json")
    with alone(out / "lock", f"{out}: its matrix is being run already; wait for it, or choose another folder"):
        failed = []
        jobs = [(name, seed) for seed in range(seeds) for name in names]
        for number, (name, seed) in enumerate(jobs, 1):
            folder = out / "runs" / f"{name}-seed{seed}"
            if (folder / "errors.json").is_file():
                continue
            print(f"run {number} of {len(jobs)}: {folder}", file=sys.stderr, flush=True)
            one_tower = name != BASE and ablated(base, name).towers == 1
            try:
                _run(folder, shards, recipe, name, seed, epochs, 1 if one_tower else processes, options)
            except RunFailed as error:  # a changed network may diverge, which is a result too
                if name == BASE:
                    raise
                failed.append(str(error))
                continue
            write_table(out)
        table = write_table(out)
        if failed:
            raise RunFailed(f"{table} lacks {len(failed)} of {len(jobs)} runs: {'; '.join(failed)}")
        return table


def _run(folder: Path, shards: Path, recipe: str, name: str, seed: int, epochs: int | None, processes: int,
         options: Sequence[str]) -> None:
    if (folder / "run.json").is_file():
        how = ["--resume"]
    else:
        how = ["--recipe", recipe, *(["--ablation", name] if name != BASE else []), "--seed", str(seed),
               *(["--epochs", str(epochs)] if epochs else [])]
    _alexnet(processes, "train", shards, folder, *how, "--keep", "1", *options)
    errors = {}
    for views in ("10", "1"):
        found = json.loads(_alexnet(processes, "evaluate", folder, shards, "--views", views, "--json", *options))
        errors[views] = [found["top1_error"], found["top5_error"]]
    outcome = Outcome(name, seed, errors["10"], errors["1"], found["images"])
    write_durably(folder / "errors.json", (json.dumps(asdict(outcome)) + "\n").encode())


def _alexnet(processes: int, command: str, *arguments: str | Path) -> str:
    """Run a command of ours; return what it prints. RunFailed where it fails."""
    done = alexnet(processes, command, *arguments)
    if done.returncode:
        raise RunFailed(f"{command} of {arguments[0 if command == 'evaluate' else 1]} ended with exit code "
                        f"{done.returncode}, as told above")
    return done.stdout
