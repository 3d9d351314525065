"""Pack a data set into shards: list it, plan the order, fit and encode, write; the manifest comes last.

Every shard is a pure function of the source, the seed and the store. So shards can be made by any number of workers, in
any number of processes on any number of hosts, and after any number of interruptions: what comes out is the same,
byte for byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError, PreprocessError
from pipeline.manifest import FILE_NAME, Manifest, parse_manifest
from pipeline.packing.index import Index
from pipeline.packing.making import Progress, make_shards, refuse_rejected, rejection
from pipeline.packing.outcome import OWN_FILES, REJECTED_NAME, finish
from pipeline.packing.plan import Packing, Plan
from pipeline.packing.receipts import FOLDER, PLAN, RECEIPT, receipt_name
from pipeline.sources import Source
from pipeline.sources.reading import unpack
from pipeline.storage import LocalStorage, Storage
from pipeline.workers import WorkerLost

POLL_S = 0.5
PATIENCE_S = 3600.0  # without news of the other processes


@dataclass(frozen=True)
class Share:
    """This process's part of the work: every `size`-th shard, from number `rank` on."""

    rank: int = 0
    size: int = 1


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

    Raises DataError where the source or `storage` is unfit, PreprocessError where `storage` cannot be written or a
    worker is killed. After any failure there is no manifest, and the same call goes on where this one ended.
    """
    progress = progress or (lambda done, expected, what: None)
    with _one_line_errors(storage):
        _check_location(source, storage)
        indices = {split: Index(source, split, lambda n, split=split: progress(n, None, f"listing {split}"))
                   for split in source.splits}
        plan = Plan(source, indices, packing)
        if strict:
            for split, index in indices.items():
                refuse_rejected(rejection(source, split, entry, entry.refused) for entry in index.refused())
        manifest = _agree_on_plan(storage, plan, share)
        if manifest is not None and strict:
            refuse_rejected(json.loads(line) for line in storage.read(REJECTED_NAME).splitlines())
        if manifest is None:
            if share.size == 1:
                for folder in ("", FOLDER):
                    storage.remove_temporary(folder)
            unpacked = _unpack(source, storage, indices, share)
            mine = [shard for number, shard in enumerate(plan.shards()) if number % share.size == share.rank]
            make_shards(source, unpacked, storage, plan, mine, workers, strict, progress)
            if share.rank == 0:
                _await_others(storage, plan)
                manifest = finish(source, storage, plan)
        if share.rank == 0:
            storage.remove_folder(FOLDER)
        return manifest if share.rank == 0 else None


@contextmanager
def _one_line_errors(storage: Storage) -> Iterator[None]:
    try:
        yield
    except WorkerLost as error:
        raise PreprocessError(f"{error}: run again with fewer --workers or more memory; it goes on where it was"
                              ) from None
    except OSError as error:  # the source's own are DataErrors
        reason = error.strerror or " ".join(str(error).split())
        raise PreprocessError(f"{storage.location}: cannot be read or written ({reason}): mend that and run again; it "
                              "goes on where it was") from None


def _check_location(source: Source, storage: Storage) -> None:
    """Raise DataError where `storage` is no place for shards."""
    if isinstance(storage, LocalStorage):
        out, given = storage.folder.resolve(), source.path.resolve()
        if given in (out, *out.parents):
            raise DataError(f"{storage.location}: lies in the source; choose a folder outside of {source.path}")
        for place in (storage.folder, *storage.folder.parents):
            if place.exists() and not place.is_dir():
                raise DataError(f"{storage.location}: {place} is not a folder; choose another one")
    found = storage.sizes()
    foreign = sorted(name for name in found if not OWN_FILES.fullmatch(name))
    if foreign:
        raise DataError(f"{storage.location}: holds {foreign[0]}, which is not ours; choose a new or empty folder")
    if found and f"{FOLDER}/" not in found and FILE_NAME not in found:
        raise DataError(f"{storage.location}: holds {min(found)} and nothing that says what it was made of; "
                        "choose a new or empty folder")


def _agree_on_plan(storage: Storage, plan: Plan, share: Share) -> Manifest | None:
    """Return the manifest if all is done already; else see to it that every process, and every run that went before,
    has the same plan. DataError where `storage` holds another one."""
    waited_since = time.monotonic()
    while True:
        found = storage.sizes()
        if FILE_NAME in found:
            manifest = parse_manifest(storage.read(FILE_NAME), f"{storage.location}: {FILE_NAME}")
            if manifest.plan != plan.sha256:
                raise DataError(f"{storage.location}: already holds shards, of another source or with other options; "
                                "choose another folder")
            return manifest
        receipts = storage.sizes(FOLDER)
        if PLAN in receipts:
            _compare_plans(storage, plan)
            return None
        if share.rank == 0:
            if any(name.endswith(RECEIPT) for name in receipts):
                raise DataError(f"{storage.location}: holds {FOLDER}/ without {PLAN}, so nothing says of what; choose "
                                "another folder, or remove this one to start anew")
            with storage.create(PLAN) as file:
                file.write((json.dumps(plan.facts, indent=1) + "\n").encode())
            return None
        if time.monotonic() - waited_since > PATIENCE_S:
            raise PreprocessError(f"{storage.location}: rank 0 has not begun; do all hosts see this place?")
        time.sleep(POLL_S)


def _compare_plans(storage: Storage, plan: Plan) -> None:
    try:
        theirs = json.loads(storage.read(PLAN))
        names = sorted(plan.facts.keys() | theirs.keys())
        differing = [name for name in names if theirs.get(name) != plan.facts.get(name)]
    except (ValueError, AttributeError):
        differing = ["a damaged plan.json"]
    if differing:
        raise DataError(f"{storage.location}: begun with other {', '.join(differing)}; choose another folder, or "
                        "remove this one to start anew")


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


def _await_others(storage: Storage, plan: Plan) -> None:
    """Wait until every shard of every process has its receipt."""
    wanted = {receipt_name(shard) for shard in plan.shards()}
    missing, news_at = len(wanted), time.monotonic()
    while True:
        now_missing = len(wanted - storage.sizes(FOLDER).keys())
        if not now_missing:
            return
        if now_missing < missing:
            missing, news_at = now_missing, time.monotonic()
        if time.monotonic() - news_at > PATIENCE_S:
            raise PreprocessError(f"{storage.location}: {missing} shards of the other processes do not arrive; run "
                                  "again, it goes on where it was")
        time.sleep(POLL_S)
