"""What every layout of a data set offers to the packer: its classes, and where each image lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.manifest import SynsetClass


class Entry(NamedTuple):
    """One image that a source lists; pipeline.sources.reading reads its bytes, in any order, in any process.

    It lies `size` bytes long at `offset` of the file `archive`, or is a file of its own, or is a row of a Parquet file.
    """

    archive: str  # path relative to `Source.root`; "" for a file of its own
    member: str  # name inside the archive, or path relative to `Source.root`; undecodable bytes as surrogates
    label: int  # position of its class in `Source.classes`; -1 where it has none (then refused says why)
    offset: int = 0  # bytes from the beginning of the archive, unpacked if it is compressed; in Parquet, the row
    size: int = 0  # bytes; in Parquet 0
    refused: str = ""  # why it is not to be read ("a link, not a file"), or ""
    block: int = -1  # entries of one block >= 0 (a Parquet row group) are read together at little more than one's cost


class Source(Protocol):
    """Made by pipeline.sources.open_source, which reads label files and lists, but no images."""

    path: Path  # as the user gave it
    root: Path  # the folder that entries' paths start from
    layout: str
    classes: list[SynsetClass]  # sorted by wnid; label = position
    splits: tuple[str, ...]  # those of "train", "val", "test" that it holds, with labels, in this order
    archives: tuple[Path, ...]  # the archives and label files that it is made of, for their MD5
    missing: tuple[str, ...]  # lines for a person: what the published data set has and this copy has not

    def entries(self, split: str) -> Iterator[Entry]:
        """List every image of a split, each time in the same order, holding no more than one at a time in memory.

        Raises DataError where an archive is damaged, or its images and the source's labels disagree: when the last
        entry has been yielded, they agree.
        """
