"""All benchmarks, one after the other, each in processes of its own: JSON a part and one page of Markdown."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from launch import facts
from launch.errors import UserError


def parts(shards: Path | None, images: Path | None, settings: list[str], device: list[str],
          transport: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    """Yield (name, processes, arguments of `alexnet bench`) of what can be measured with what is given.

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


def measure_everything(out: Path, shards: Path | None, images: Path | None, settings: list[str], device: list[str],
                       transport: list[str], tell: Callable[[str], object]) -> list[str]:
    """Run every part that has no result of this commit and these arguments in `out` yet; return those that failed.

    Writes `out`/PART.json, and `out`/results.md of all that are there. `tell` is given a line before each part.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; name another folder") from None
    commit, failed, found = facts.commit(), [], []
    for name, processes, arguments in parts(shards, images, settings, device, transport):
        path = out / f"{name}.json"
        asked = {"part": name, "processes_started": processes, "arguments": arguments, "commit": commit}
        known = _read(path)
        if known is None or {key: known.get(key) for key in asked} != asked or commit is None or "+" in commit:
            tell(f"{name} ...")
            measured = _measure(processes, arguments)
            if isinstance(measured, str):
                failed.append(f"{name}: {measured}")
                continue
            known = measured | asked
            path.write_text(json.dumps(known, indent=1) + "\n")
        found.append(known)
    (out / "results.md").write_text(markdown(found, failed))
    return failed


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _measure(processes: int, arguments: list[str]) -> dict | str:
    """Return what `alexnet bench` printed, or why it failed."""
    program = ["-m", "launch.cli", "bench", *arguments]
    if processes > 1:
        program = ["-m", "launch.torchrun", "--standalone", "--nproc-per-node", str(processes), *program]
    done = subprocess.run([sys.executable, *program], cwd=facts.ROOT, capture_output=True, text=True)
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
