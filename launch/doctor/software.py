"""Python and the packages of requirements.txt."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from launch.doctor.finding import INSTALL, NOTE, OK, WRONG, Finding
from model.errors import reason

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
OLDEST_PYTHON = 3, 10
TESTED_TORCH = (2, 11), (2, 13)


def python() -> Finding:
    return judge_python(sys.version_info[:3])


def judge_python(version: tuple[int, ...]) -> Finding:
    found = ".".join(map(str, version))
    if version < OLDEST_PYTHON:
        return Finding(WRONG, found, "install Python 3.10 or newer, and the packages into it")
    return Finding(OK, found)


def torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a library of CUDA that is not there is an OSError
        return Finding(WRONG, f"cannot be imported: {reason(error)}", INSTALL)
    return judge_torch(torch.__version__, torch.version.cuda)


def judge_torch(version: str, cuda: str | None) -> Finding:
    """`cuda` is what it was built for, None for a CPU."""
    found = f"{version}, built for {f'CUDA {cuda}' if cuda else 'CPUs'}"
    oldest, newest = TESTED_TORCH
    if not oldest <= tuple(map(int, version.split(".")[:2])) <= newest:
        return Finding(NOTE, f"{found}; 2.11 to 2.13 are tested", INSTALL)
    return Finding(OK, found)


def dali() -> Finding:
    try:
        from nvidia import dali
    except Exception as error:
        return Finding(WRONG, f"cannot be imported: {reason(error)}", INSTALL)
    (pinned,) = [version for name, version in pins().items() if _own_check(name) == "dali"]
    return judge_dali(dali.__version__, pinned)


def judge_dali(version: str, pinned: str) -> Finding:
    if version != pinned:
        return Finding(NOTE, f"{version}; {pinned} is tested", INSTALL)
    return Finding(OK, version)


def packages() -> Finding:
    """The others."""
    pinned = {name: version for name, version in pins().items() if _own_check(name) is None}
    installed = {}
    for name in pinned:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return judge_packages(pinned, installed)


def judge_packages(pinned: dict[str, str], installed: dict[str, str | None]) -> Finding:
    """Versions by name; None for what is not installed."""
    missing = [name for name in pinned if installed[name] is None]
    if missing:
        return Finding(WRONG, f"missing: {', '.join(missing)}", INSTALL)
    others = [f"{name} {installed[name]} (pinned: {version})" for name, version in pinned.items()
              if installed[name].split("+")[0] != version]  # "+cpu" and the like name a build
    if others:
        return Finding(NOTE, f"not as tested: {', '.join(others)}", INSTALL)
    return Finding(OK, f"{len(pinned)} others, as pinned")


def pins() -> dict[str, str]:
    """Return the pinned versions that are for this Python, by package."""
    from packaging.requirements import Requirement  # which matplotlib brings

    lines = (REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.is_file() else  # else installed from a wheel
             importlib.metadata.requires("alexnet-two-towers"))
    found = [Requirement(line) for line in lines if line.strip()]
    return {one.name: str(one.specifier).removeprefix("==") for one in found
            if one.marker is None or one.marker.evaluate()}


def _own_check(name: str) -> str | None:
    """DALI's package has another name for every CUDA; torch of some tested versions will do."""
    return "torch" if name == "torch" else "dali" if name.startswith("nvidia-dali") else None
