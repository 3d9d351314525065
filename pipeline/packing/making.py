"""Make shards: chunks of images go to workers, what comes back is put in its place, a full shard is written."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from pipeline.packing import chunks
from pipeline.packing.chunks import ChunkFitter, Fitted
from pipeline.packing.plan import Plan, Shard
from pipeline.packing.receipts import Receipt
from pipeline.packing.rejections import printable, refuse_rejected, rejection
from pipeline.progress import Progress
from pipeline.shards import write_shard
from pipeline.sources import Entry, Source
from pipeline.statistics import PixelStatistics
from pipeline.storage import Storage
from pipeline.workers import WorkerLost, Workers

CHUNKS_PER_WORKER = 2


def make_shards(
    source: Source, unpacked: Mapping[str, Path], storage: Storage, plan: Plan, shards: Sequence[Shard],
    there: Collection[str], workers: int, strict: bool, progress: Progress,
) -> None:
    """Make `shards`, but for those named in `there`, each with its receipt; `strict` as in preprocess."""
    expected, done = Counter(), Counter()
    for shard in shards:
        expected[shard.split] += len(shard.rows)
        done[shard.split] += len(shard.rows) if shard.name in there else 0
    missing = [shard for shard in shards if shard.name not in there]
    workers = min(workers, sum(-(-len(shard.rows) // chunks.CHUNK_IMAGES) for shard in missing))  # more have no work
    with Workers(workers, ChunkFitter(source.root, unpacked, plan.packing.store)) as pool:
        rows: list[tuple[Entry, Fitted]] = []
        statistics = PixelStatistics()
        for shard, entries, (fitted, chunk_statistics) in _in_order(pool, CHUNKS_PER_WORKER * workers, plan, missing):
            if strict:
                refuse_rejected(rejection(source, shard.split, entry, image.reason, image.sha256)
                                for entry, image in zip(entries, fitted) if image.reason)
            rows += zip(entries, fitted, strict=True)
            statistics.merge(chunk_statistics)
            done[shard.split] += len(entries)
            progress(done[shard.split], expected[shard.split], f"packing {shard.split}")
            if len(rows) == len(shard.rows):
                in_place = [rows[i] for i in np.argsort(shard.places)]
                _write(source, storage, shard, in_place, statistics)
                rows, statistics = [], PixelStatistics()


def _in_order(
    pool: Workers, limit: int, plan: Plan, shards: Iterable[Shard]
) -> Iterator[tuple[Shard, list[Entry], tuple[list[Fitted], PixelStatistics]]]:
    """Fit shard after shard, chunk after chunk, with at most `limit` chunks under way."""
    under_way: deque[tuple[Shard, list[Entry], Future]] = deque()
    for shard in shards:
        entries = plan.entries(shard)
        for part in chunks.chunks(entries):
            if len(under_way) == limit:
                yield _finished(*under_way.popleft())
            under_way.append((shard, entries[part], pool.submit(entries[part])))
    while under_way:
        yield _finished(*under_way.popleft())


def _finished(
    shard: Shard, entries: list[Entry], result: Future
) -> tuple[Shard, list[Entry], tuple[list[Fitted], PixelStatistics]]:
    try:
        return shard, entries, result.result()
    except WorkerLost as error:  # should an image have done that, the user finds it
        first, last = (printable(f"{e.archive} {e.member}".strip()) for e in (entries[0], entries[-1]))
        raise WorkerLost(f"{error}, at one of {len(entries)} images from {first} to {last}") from None


def _write(
    source: Source, storage: Storage, shard: Shard, rows: list[tuple[Entry, Fitted]], statistics: PixelStatistics
) -> None:
    packed = [(image.stored, entry.label, printable(entry.member)) for entry, image in rows if not image.reason]
    rejected = [rejection(source, shard.split, entry, image.reason, image.sha256)
                for entry, image in rows if image.reason]
    file = write_shard(storage, shard.name, *zip(*packed)) if packed else None
    counts = Counter(label for _, label, _ in packed)
    Receipt(file, dict(sorted(counts.items())), rejected, statistics).save(storage, shard)
