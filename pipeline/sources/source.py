"""What every layout of a data set offers to the packer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.manifest import SynsetClass


class SourceImage(NamedTuple):
    """One entry of a split: the bytes of an image file, or the reason why they were not read."""

    name: str  # where it lies within the source
    label: int  # position of its class in `Source.classes`; -1 for a refused entry outside every class
    data: bytes
    refused: str = ""  # "a symbolic link", ...; data is then empty


class Source(Protocol):
    path: Path
    layout: str
    classes: list[SynsetClass]  # sorted by wnid; label = position

    def count(self, split: str) -> int | None:
        """Return how many entries `read` is expected to yield, None where that is not known cheaply."""

    def read(self, split: str) -> Iterator[SourceImage]:
        """Yield every image of "train" or "val", each time in the same order.

        Raises DataError where the source turns out to be damaged.
        """
