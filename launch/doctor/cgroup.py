"""What a container may use of its host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    memory_bytes: float  # infinite where there is no limit
    cores: float  # of processor time in a second


def limits(root: Path = Path("/")) -> Limits:
    """Read them of cgroup's version 2 and 1, whichever is there. `root` is where proc and sys lie."""
    memory, cores = [float("inf")], [float("inf")]
    for folder in _folders(root):
        memory += [float(words[0]) for name in ("memory.max", "memory.limit_in_bytes")
                   if (words := _words(folder / name)) and words[0] != "max"]
        quota = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            cores.append(float(quota[0]) / float(quota[1]))
    return Limits(min(memory), min(cores))


def _folders(root: Path) -> Iterator[Path]:
    """Those of this process, and all above them, whose limits count as well. A container may see but the uppermost."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # "0::/a/b", or of version 1 "4:memory:/a/b"
        _, controllers, place = line.split(":", 2)
        mounted = root / "sys/fs/cgroup" / controllers
        for above in [Path(place), *Path(place).parents]:
            yield mounted / above.relative_to("/")


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
