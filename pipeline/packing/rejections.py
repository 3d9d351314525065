"""The lines of rejected.jsonl: what is left out, and why."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.errors import DataError
from pipeline.sources import Entry, Source


def rejection(source: Source, split: str, entry: Entry, reason: str, sha256: str | None = None) -> dict:
    """Return a line of rejected.jsonl."""
    wnid = source.classes[entry.label].wnid if entry.label >= 0 else None
    return {"split": split, "archive": printable(entry.archive), "member": printable(entry.member), "wnid": wnid,
            "reason": reason, "sha256": sha256}


def refuse_rejected(rejections: Iterable[dict]) -> None:
    """Raise DataError for the first."""
    for found in rejections:
        where = f"{found['archive']}: {found['member']}" if found["archive"] else found["member"]
        raise DataError(f"{where}: {found['reason']}; mend it, or run without --strict to leave it out")


def printable(name: str) -> str:
    """Archives may hold names that are not UTF-8; Arrow's strings may not."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
