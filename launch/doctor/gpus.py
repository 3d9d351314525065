"""GPUs, and what their kernels need. No GPU is no fault, one that torch cannot use is.

Nothing is begun on a GPU here: it may be in use, or take one process at a time.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

from launch.doctor.finding import NOTE, OK, WRONG, Finding, gib

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    free_bytes: int | None = None  # these as nvidia-smi has them, None where that says nothing
    mode: str | None = None  # "Default", "Exclusive_Process", "Prohibited"
    driver: str | None = None


def usable() -> bool:
    """Whether torch can use a GPU here."""
    try:
        import torch
    except Exception:  # which its own check tells
        return False
    return torch.cuda.is_available()


def gpus(with_driver: bool) -> Finding:
    """`with_driver`: ask nvidia-smi too, which may take seconds."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        none = not torch.cuda.is_available()
    if none:
        return judge_no_gpu(any(Path("/dev").glob("nvidia[0-9]*")), os.environ.get("CUDA_VISIBLE_DEVICES"),
                            torch.version.cuda, [str(one.message) for one in told])
    by_driver = _told_by_driver() if with_driver else {}
    found = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found.append(Gpu(about.name, about.total_memory, *by_driver.get(str(about.uuid).removeprefix("GPU-"), ())))
    return judge_gpus(found)


def judge_no_gpu(present: bool, visible: str | None, cuda: str | None, told: list[str]) -> Finding:
    """Torch can use none. `present`: the kernel has one; `visible`: CUDA_VISIBLE_DEVICES; `cuda`: what torch was built
    for; `told`: torch's warnings."""
    if not present:
        return Finding(OK, "none: trains on the CPU")
    if visible in ("", "-1"):
        return Finding(NOTE, f"hidden by CUDA_VISIBLE_DEVICES={visible}: trains on the CPU",
                       "to use it: unset CUDA_VISIBLE_DEVICES")
    to_hide = "or, to train on the CPU, hide it: export CUDA_VISIBLE_DEVICES="
    if cuda is None:
        return Finding(WRONG, "there is one, but this torch was built for CPUs",
                       f"install torch's build for CUDA; {to_hide}")
    why = f" ({told[0].splitlines()[0][:200]})" if told else ""
    return Finding(WRONG, f"there is one, but torch cannot use it{why}",
                   f"install a driver that has CUDA {cuda} (`nvidia-smi` shows what it has); {to_hide}")


def judge_gpus(found: list[Gpu]) -> Finding:
    described = []
    for number, gpu in enumerate(found):
        free = "" if gpu.free_bytes is None else f", {gib(gpu.free_bytes)} free"
        described.append(f"{number}: {gpu.name}, {gib(gpu.memory_bytes)}{free}")
    driver = f"; driver {found[0].driver}" if found[0].driver else ""
    all_of_them = "; ".join(described) + driver
    for number, gpu in enumerate(found):
        if gpu.mode == "Prohibited":
            return Finding(WRONG, f"{all_of_them}; {number} takes no process",
                           f"sudo nvidia-smi -i {number} -c DEFAULT")
    if len(found) == 1 and found[0].mode == "Exclusive_Process":
        return Finding(NOTE, f"{all_of_them}; takes one process at a time",
                       "train in one (PROCESSES=1 bash launch/train.sh), or: sudo nvidia-smi -c DEFAULT")
    for number, gpu in enumerate(found):
        if gpu.free_bytes is not None and gpu.free_bytes < gpu.memory_bytes / 2:
            return Finding(NOTE, f"{all_of_them}; others use most of {number}'s memory",
                           "`nvidia-smi` shows who; CUDA_VISIBLE_DEVICES names the GPUs to use")
    return Finding(OK, all_of_them)


def _told_by_driver() -> dict[str, tuple[int | None, str, str]]:
    """Return what `told_of` does; nothing where nvidia-smi does not answer."""
    try:
        told = subprocess.run(["nvidia-smi", "--query-gpu=uuid,memory.free,compute_mode,driver_version",
                               "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return told_of(told.stdout)


def told_of(answer: str) -> dict[str, tuple[int | None, str, str]]:
    """Return free bytes, compute mode and driver's version by a GPU's UUID, of nvidia-smi's lines."""
    rows = [line.split(", ") for line in answer.splitlines()]
    return {row[0].removeprefix("GPU-"): (int(row[1]) * MIB if row[1].isdecimal() else None, row[2], row[3])
            for row in rows if len(row) == 4}


def links() -> Finding | None:
    """Whether the GPUs reach each other's memory directly."""
    if not usable():
        return None
    import torch

    pairs = list(itertools.combinations(range(torch.cuda.device_count()), 2))
    if not pairs:
        return None
    direct = [(a, b) for a, b in pairs
              if torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)]
    return judge_links(pairs, direct)


def judge_links(pairs: list[tuple[int, int]], direct: list[tuple[int, int]]) -> Finding:
    """Towers are on GPUs 0 and 1: pairs[0]."""
    if pairs[0] in direct:
        others = [f"{a} and {b}" for a, b in pairs if (a, b) not in direct]
        return Finding(OK, "0 and 1 reach each other directly" + (f"; not so {', '.join(others)}" if others else ""))
    mend = (f"use a pair that does: export CUDA_VISIBLE_DEVICES={direct[0][0]},{direct[0][1]}" if direct else
            "`nvidia-smi topo -p2p r` says why not; --transport cuda-ipc needs it, rpc does not")
    return Finding(NOTE, "0 and 1 do not reach each other directly: what the towers swap takes the way through the "
                   "CPU's memory", mend)


def triton() -> Finding | None:
    if not usable():
        return None
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    return judge_triton(importlib.util.find_spec("triton") is not None, compiler)


def judge_triton(present: bool, compiler: str | None) -> Finding:
    if not present:
        return Finding(NOTE, "missing: training is slow on a GPU", "python -m pip install triton")
    if compiler is None:
        return Finding(NOTE, "has no C compiler: training is slow on a GPU", "sudo apt-get install gcc libc6-dev")
    return Finding(OK, f"with {compiler}")
