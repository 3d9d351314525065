"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WRONG = "ok", "note", "wrong"
INSTALL = "python -m pip install -r requirements.txt"


@dataclass(frozen=True)
class Finding:
    state: str  # OK, NOTE (training works) or WRONG (it does not, or not as it is meant to)
    found: str
    mend: str = ""  # what to do, where there is something


def gib(count: float) -> str:
    """Say a number of bytes."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
