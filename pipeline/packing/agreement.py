"""What the processes of one run, and the runs that come one after the other, agree on: they meet in OUT only.

OUT/packing/ holds the plan, a receipt for each finished shard and a lock of each process. It goes when the manifest has
been written, which says that all is done.
"""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from pipeline.errors import DataError, PreprocessError
from pipeline.files import locked
from pipeline.manifest import FILE_NAME, Manifest, parse_manifest
from pipeline.packing.plan import Plan
from pipeline.packing.receipts import FOLDER, PLAN, finished
from pipeline.storage import LocalStorage, Storage

POLL_S = 0.5
PATIENCE_S = 3600.0  # without news of the other processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """This process's part of the work: every `size`-th shard, from number `rank` on."""

    rank: int = 0
    size: int = 1


def agree_on_plan(storage: Storage, plan: Plan, share: Share) -> Manifest | None:
    """Return the manifest if all is done already; else see to it that every process, and every run that went before,
    has the same plan. DataError where `storage` holds another one."""
    waited_since = time.monotonic()
    while True:
        if (manifest := manifest_of(storage, plan)) is not None:
            return manifest
        if PLAN in storage.sizes(FOLDER):
            try:
                _compare_plans(storage, plan)
            except FileNotFoundError:  # another process has finished just now
                continue
            return None
        if share.rank == 0:
            with storage.create(PLAN) as file:
                file.write((json.dumps(plan.facts, indent=1) + "\n").encode())
            return None
        if time.monotonic() - waited_since > PATIENCE_S:
            raise PreprocessError(f"{storage.location}: rank 0 has not begun; do all hosts see this place?")
        time.sleep(POLL_S)


def manifest_of(storage: Storage, plan: Plan) -> Manifest | None:
    """Return the manifest if there is one; DataError where it is of another plan."""
    if FILE_NAME not in storage.sizes():
        return None
    manifest = parse_manifest(storage.read(FILE_NAME), f"{storage.location}: {FILE_NAME}")
    if manifest.plan != plan.sha256:
        raise DataError(f"{storage.location}: already holds shards, of another source or with other options; "
                        "choose another folder")
    return manifest


def _compare_plans(storage: Storage, plan: Plan) -> None:
    try:
        theirs = json.loads(storage.read(PLAN))
        names = sorted(plan.facts.keys() | theirs.keys())
        differing = [name for name in names if theirs.get(name) != plan.facts.get(name)]
    except (ValueError, AttributeError, RecursionError):
        raise DataError(f"{storage.location}: {PLAN} is damaged; choose another folder, or remove this one to start "
                        "anew") from None
    if differing:
        raise DataError(f"{storage.location}: begun with other {', '.join(differing)}; choose another folder, or "
                        "remove this one to start anew")


@contextmanager
def only_one(storage: Storage, share: Share) -> Iterator[None]:
    """Raise DataError where another run is at work in the same local folder. An object store has no locks: two runs
    there do the same work twice, with the same result."""
    with ExitStack() as stack:
        if isinstance(storage, LocalStorage):
            if share.rank == 0:
                (storage.folder / FOLDER).mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(storage.folder / FOLDER / f"rank-{share.rank}.lock", wait=False))
            except BlockingIOError:
                raise DataError(f"{storage.location}: another run is packing there; wait for it, or choose another "
                                "folder") from None
            except FileNotFoundError:
                pass  # the others have finished and tidied up: there is nothing left to do
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                log.warning("%s: no locks on this file system; see that no other run packs there", storage.location)
        yield


def await_all(storage: Storage, plan: Plan, share: Share) -> None:
    """Wait until every shard of every process is there, with its receipt. A process that is alone does not wait.

    Others may be making damaged shards anew, which their old receipts do not tell: hence the hashes.
    """
    waiting, news_at = list(plan.shards()), time.monotonic()
    while True:
        there = {shard.name for shard, _ in finished(waiting, storage, hashes=share.size > 1)}
        if there:
            waiting, news_at = [shard for shard in waiting if shard.name not in there], time.monotonic()
        if not waiting:
            return
        if share.size == 1:
            raise PreprocessError(f"{storage.location}: {waiting[0].name} or its receipt has vanished meanwhile; run "
                                  "again, it goes on where it was")
        if time.monotonic() - news_at > PATIENCE_S:
            raise PreprocessError(f"{storage.location}: {len(waiting)} shards of the other processes do not arrive; "
                                  "run again, it goes on where it was")
        time.sleep(POLL_S)
