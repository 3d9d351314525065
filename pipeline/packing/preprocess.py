"""Pack a data set into shards: list it, plan the order, fit and encode, write; the manifest comes last.

Every shard is a pure function of the source, the seed and the store. So shards can be made by any number of workers, in
any number of processes on any number of hosts, and after any number of interruptions: what comes out is the same,
byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DataError, PreprocessError
from pipeline.manifest import FILE_NAME, REJECTED_NAME, Manifest
from pipeline.packing.agreement import Share, agree_on_plan, await_all, manifest_of, only_one
from pipeline.packing.index import Index
from pipeline.packing.making import make_shards
from pipeline.packing.mending import check_mended, damaged_shards
from pipeline.packing.outcome import OWN_FILES, finish
from pipeline.packing.plan import Packing, Plan
from pipeline.packing.receipts import FOLDER, PLAN, finished
from pipeline.packing.rejections import refuse_rejected, rejection
from pipeline.progress import Progress
from pipeline.sources import Source
from pipeline.sources.reading import unpack
from pipeline.storage import LocalStorage, Storage
from pipeline.workers import WorkerLost


def preprocess(
    source: Source,
    storage: Storage,
    packing: Packing,
    workers: int,
    strict: bool = False,
    share: Share = Share(),
    progress: Progress | None = None,
) -> Manifest | None:
    """Pack `source` into `storage`; return the manifest, or None where another process writes it (share.rank > 0).

    `storage` must be empty, or hold what a run of the same source, seed and store left, which is then completed.
    Images that cannot be read are left out and listed in rejected.jsonl; with `strict` the first of them is a
    DataError. `workers` is the number of processes that read, fit and encode. The statistics are those of the fitted
    training images before they are encoded.

    Of a data set that is finished, those shards are made again that are damaged.

    Raises DataError where the source or `storage` is unfit or another run is at work there, PreprocessError where
    `storage` cannot be written or a worker is killed. After any failure the same call goes on where this one ended.
    """
    progress = progress or (lambda done, expected, what: None)
    with _one_line_errors(storage):
        _check_location(source, storage, share)
        indices = {split: Index(source, split, lambda n, split=split: progress(n, None, f"listing {split}"))
                   for split in source.splits}
        plan = Plan(source, indices, packing)
        if strict:
            for split, index in indices.items():
                refuse_rejected(rejection(source, split, entry, entry.refused) for entry in index.refused())
        manifest = agree_on_plan(storage, plan, share)
        if manifest is not None and share.rank > 0:
            return None
        with only_one(storage, share):
            if manifest is None:
                manifest = _pack(source, storage, indices, plan, workers, strict, share, progress)
            else:
                _mend(source, storage, indices, plan, manifest, workers, strict, progress)
        if share.rank > 0:
            return None
        storage.remove_folder(FOLDER)
        return manifest


def _pack(
    source: Source, storage: Storage, indices: dict[str, Index], plan: Plan, workers: int, strict: bool, share: Share,
    progress: Progress,
) -> Manifest | None:
    """Make this process's shards; where it is the first one, wait for the others and write the manifest."""
    if share.size == 1:
        for folder in ("", FOLDER):
            storage.remove_temporary(folder)
    mine = [shard for number, shard in enumerate(plan.shards()) if number % share.size == share.rank]
    there = set()
    for shard, receipt in finished(mine, storage, hashes=True):
        if strict:
            refuse_rejected(receipt.rejected)
        there.add(shard.name)
    if len(there) < len(mine):
        # A process that comes late may find nothing because another one has just finished.
        if (manifest := manifest_of(storage, plan)) is not None:
            return manifest
        unpacked = _unpack(source, storage, indices, share)
        make_shards(source, unpacked, storage, plan, mine, there, workers, strict, progress)
    if share.rank > 0:
        return None
    await_all(storage, plan, share)
    return finish(source, storage, plan, strict)


def _mend(
    source: Source, storage: Storage, indices: dict[str, Index], plan: Plan, manifest: Manifest, workers: int,
    strict: bool, progress: Progress,
) -> None:
    if strict:
        try:
            lines = [json.loads(line) for line in storage.read(REJECTED_NAME).splitlines()]
        except ValueError:
            raise DataError(f"{storage.location}: {REJECTED_NAME} is damaged: restore it") from None
        refuse_rejected(lines)
    damaged = damaged_shards(storage, plan, manifest, progress)
    if damaged:
        unpacked = _unpack(source, storage, indices, Share())
        make_shards(source, unpacked, storage, plan, damaged, set(), workers, strict, progress)
        check_mended(storage, manifest, damaged)


@contextmanager
def _one_line_errors(storage: Storage) -> Iterator[None]:
    try:
        yield
    except WorkerLost as error:
        raise PreprocessError(f"{error}: run again with fewer --workers or more memory; it goes on where it was"
                              ) from None
    except OSError as error:  # the source's own are DataErrors
        reason = error.strerror or " ".join(str(error).split())
        where = error.filename or storage.location
        raise PreprocessError(f"{where}: cannot be read or written ({reason}): mend that and run again; it goes on "
                              "where it was") from None


def _check_location(source: Source, storage: Storage, share: Share) -> None:
    """Raise DataError where `storage` is no place for shards."""
    if isinstance(storage, LocalStorage):
        try:
            _check_folder(source, storage)
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
            reason = getattr(error, "strerror", None) or "links in a circle"
            raise DataError(f"{storage.location}: cannot be used ({reason}); choose another folder") from None
    found = storage.sizes(FOLDER) | storage.sizes()
    foreign = sorted(name for name in found if not OWN_FILES.fullmatch(name))
    if foreign:
        raise DataError(f"{storage.location}: holds {foreign[0]}, which is not ours; choose a new or empty folder")
    if share.rank > 0 or PLAN in found or FILE_NAME in found:
        return  # the first process writes the plan before any other one begins, perhaps at this moment
    results = sorted(name for name in found if not name.endswith(("/", ".tmp")))
    if results:
        raise DataError(f"{storage.location}: holds {results[0]} and nothing that says what it was made of; "
                        "choose a new or empty folder")


def _check_folder(source: Source, storage: LocalStorage) -> None:
    out, given = storage.folder.resolve(), source.path.resolve()
    if given in (out, *out.parents):
        raise DataError(f"{storage.location}: lies in the source; choose a folder outside of {source.path}")
    for place in (storage.folder, *storage.folder.parents):
        if os.path.lexists(place):
            if not place.is_dir():
                raise DataError(f"{storage.location}: {place} is not a folder; choose another one")
            if not os.access(place, os.W_OK | os.X_OK):
                raise DataError(f"{storage.location}: cannot be written; choose another folder, or change its rights")
            return


def _unpack(source: Source, storage: Storage, indices: dict[str, Index], share: Share) -> dict[str, Path]:
    """Unpack compressed archives, in which nothing can be found without reading all that goes before."""
    compressed = sorted(set().union(*(index.compressed for index in indices.values())))
    if compressed and not isinstance(storage, LocalStorage):
        raise DataError(f"{source.root / compressed[0]}: compressed, and there is no local folder to unpack it in; "
                        "unpack it with gunzip")
    copies = {}
    for number, archive in enumerate(compressed):
        copies[archive] = storage.folder / FOLDER / f"unpacked-{share.rank}-{number}.tar"
        if not copies[archive].exists():
            unpack(source.root / archive, copies[archive])
    return copies
