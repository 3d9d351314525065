"""What a source holds, without writing anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.progress import Progress
from pipeline.sources import Source

PROGRESS_IMAGES = 1 << 14


@dataclass(frozen=True)
class SplitReport:
    images: int  # that are to be read
    refused: int  # links, devices, names that lead outside, ...
    classes: int  # that have an image
    fewest: int  # images of one class; of those that have any
    most: int


def inspect(source: Source, progress: Progress | None = None) -> dict[str, SplitReport]:
    """List every split of `source`; return what each holds.

    `progress` is told (images so far, None, what is done). Raises DataError where an archive is damaged, or where
    images and labels disagree.
    """
    reports = {}
    for split in source.splits:
        of_class: Counter[int] = Counter()
        refused = 0
        for number, entry in enumerate(source.entries(split), 1):
            if entry.refused:
                refused += 1
            else:
                of_class[entry.label] += 1
            if progress is not None and number % PROGRESS_IMAGES == 0:
                progress(number, None, f"listing {split}")
        counts = of_class.values() or [0]
        reports[split] = SplitReport(sum(counts), refused, len(of_class), min(counts), max(counts))
    return reports
