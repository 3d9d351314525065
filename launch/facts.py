"""What a run must remember to be believed: command, code, versions, hardware."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from launch.environment import usable_cores

ROOT = Path(__file__).resolve().parent.parent


def code_hash() -> str:
    """Return the SHA-256 of this program's own sources: equal on two hosts that run the same code."""
    digest = hashlib.sha256()
    for package in ("launch", "model", "pipeline"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def commit() -> str | None:
    """Return the commit of the checkout, with "+" where files differ from it.

    Where there is no checkout, as in a container, the variable ALEXNET_COMMIT names it; else None.
    """
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout
    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ALEXNET_COMMIT") or None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "nvidia-dali-cuda130", "numpy", "numba", "pyarrow", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware(device: torch.device | None) -> dict:
    """Describe this host, and the GPU that `device` is; None: the one that there is, if any."""
    gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
    }


def memory_gib(device: torch.device) -> float:
    """Return what this process has of the GPU's memory, or on a CPU of the host's; mapped files do not count."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**30
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**30


def command() -> str:
    """Return the command line of `alexnet`, whose workers under torchrun have another name."""
    words = " ".join(["alexnet", *sys.argv[1:]])
    return words.encode(errors="backslashreplace").decode()  # names of files may be no text


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
