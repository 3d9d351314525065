"""All benchmarks, one after the other, each in processes of its own: JSON a part and one page of Markdown."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from launch import facts
from launch.bench.preprocess import jpegs_in
from launch.choice import choose
from launch.environment import rank_and_size
from launch.errors import UserError
from launch.processes import alexnet, alone
from model.recipe import recipe_named
from pipeline.files import TEMPORARY, read_plain, write_durably
from pipeline.manifest import check_files, load_manifest

PARTS = ("lrn", "step", "step-without-lrn", "step-two-processes", "pair", "exchange", "evaluate",
         "evaluate-two-processes", "loader", "preprocess")
PAGE, LOCK = "results.md", "lock"


def parts(shards: Path | None, images: Path | None, settings: list[str], device: list[str],
          transport: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    """Yield (name, processes, arguments of `alexnet bench`) of those PARTS that can be measured with what is given.

    `settings` are options of all that run the network, `device` those of the loader, `transport` those of two
    processes.
    """
    yield "lrn", 1, ["lrn", *settings]
    yield "step", 1, ["step", *settings]
    yield "step-without-lrn", 1, ["step", "--ablation", "no-lrn", *settings]
    yield "step-two-processes", 2, ["step", *settings, *transport]
    yield "pair", 1, ["pair", *settings]
    yield "exchange", 2, ["exchange", *settings, *transport]
    yield "evaluate", 1, ["evaluate", *settings]
    yield "evaluate-two-processes", 2, ["evaluate", *settings, *transport]
    if shards is not None:
        yield "loader", 1, ["loader", str(shards), *device]
    if images is not None:
        yield "preprocess", 1, ["preprocess", str(images)]


def measure_everything(out: Path, shards: Path | None, images: Path | None, recipe: str, device: str | None,
                       precision: str | None, transport: str, tell: Callable[[str], object]) -> list[str]:
    """Run every part that has no result of this commit, hardware and arguments in `out` yet; return those that failed.

    Writes `out`/PART.json, and `out`/results.md of those that this call is for. `tell` is given a line before each
    part.
    Raises UserError, RecipeError or DataError before the first for what no part could run with.
    """
    shards, images = (path and path.absolute() for path in (shards, images))
    if rank_and_size()[1] > 1:
        raise UserError("bench all starts torchrun itself, where a part needs it: start it without torchrun")
    recipe_named(recipe)
    choose(device, transport, precision, processes=2)
    if shards is not None:
        check_files(shards, load_manifest(shards)[0].files(), hashes=False)
    if images is not None:
        jpegs_in(images)
    device_option = ["--device", device] if device else []
    settings = ["--recipe", recipe, *device_option, *(["--precision", precision] if precision else [])]
    asked = list(parts(shards, images, settings, device_option, ["--transport", transport]))
    _prepare(out)
    with alone(out / LOCK, f"{out}: another `bench all` is at work there; wait for it, or name another folder"):
        return _measure_all(out, asked, tell)


def _prepare(out: Path) -> None:
    """Make the folder; UserError where it holds what is not ours."""
    ours = {PAGE, LOCK, *(f"{name}.json" for name in PARTS)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in out.iterdir() if path.name not in ours and path.suffix != TEMPORARY]
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; name another folder") from None
    if others:
        raise UserError(f"{out}: holds other files ({min(others)}); name another folder")


def _measure_all(out: Path, asked: list[tuple[str, int, list[str]]], tell: Callable[[str], object]) -> list[str]:
    commit, failed, found = facts.commit(), [], []
    hardware = facts.hardware(None)
    for name, processes, arguments in asked:
        path = out / f"{name}.json"
        wanted = {"part": name, "processes_started": processes, "arguments": arguments, "commit": commit}
        known = _read(path)
        if commit is None or "+" in commit or {key: known.get(key) for key in wanted} != wanted or (
                known.get("hardware") != hardware):
            tell(f"{name} ...")
            measured = _measure(processes, arguments)
            if isinstance(measured, str):
                failed.append(f"{name}: {measured}")
            else:
                found.append(measured | wanted)
                write_durably(path, (json.dumps(found[-1], indent=1) + "\n").encode())
        else:
            found.append(known)
        write_durably(out / PAGE, markdown(found, failed).encode())
    return failed


def _read(path: Path) -> dict:
    """Return what a part found; nothing where it is not there, or damaged."""
    try:
        known = json.loads(read_plain(path))
        markdown([known], [])
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}
    return known


def _measure(processes: int, arguments: list[str]) -> dict | str:
    """Return what `alexnet bench` printed, or why it failed."""
    done = alexnet(processes, "bench", *arguments, stderr=subprocess.PIPE)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(lines[-1])


def markdown(results: list[dict], failed: list[str]) -> str:
    """Return a page: a table a part, its command, and what it was measured on."""
    lines = ["# Benchmarks", ""]
    if results:
        hardware = results[0]["hardware"]
        lines += [f"Commit {results[0]['commit']}; {hardware['gpu'] or 'no GPU'}, {hardware['cores']} cores of "
                  f"{hardware['cpu']}, {hardware['memory_gib']} GiB. Median (min to max) of n.", ""]
    for found in results:
        spreads = {key: value for key, value in found.items() if _is_spread(value)}
        lines += [f"## {found['part']}", "", _command(found), "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_told(value)} |" for key, value in spreads.items()]
        lines += [f"| peer {name} | {_told(value)} |" for name, value in found.get("peers", {}).items()]
        for group in ("layer1", "layer2"):
            lines += [f"| {group}, {name}: {key} | {_told(value)} |" for name, inner in found.get(group, {}).items()
                      if isinstance(inner, dict) for key, value in inner.items()]
        lines += [f"| {name}, {inner['mib']} MiB: {key} | {_told(value)} |"
                  for name, inner in found.get("messages", {}).items() for key, value in inner.items()
                  if _is_spread(value)]
        settings = ("recipe", "batch", "processes", "threads", "workers", "device", "precision", "transport", "store",
                    "multiply_flops_per_s", "copied_bytes_per_s", "arithmetic_s", "bytes_s", "link_bytes_per_s",
                    "latency_s", "sent_bytes")
        lines += ["", ", ".join(f"{key} {found[key]}" for key in settings if found.get(key) is not None), ""]
    lines += [line for problem in failed for line in (f"Failed: {problem}", "")]
    return "\n".join(lines)


def _is_spread(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"median", "min", "max", "n"}


def _told(value: dict) -> str:
    return f"{value['median']:g} ({value['min']:g} to {value['max']:g}), n = {value['n']}"


def _command(found: dict) -> str:
    words = " ".join(found["arguments"])
    if found["processes_started"] == 1:
        return f"`alexnet bench {words}`"
    processes = found["processes_started"]
    return f"`python -m launch.torchrun --standalone --nproc-per-node {processes} -m launch.cli bench {words}`"
