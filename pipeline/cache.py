"""Shards in an object store, trained on through a local copy."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import DataError
from pipeline.files import TEMPORARY, locked, sha256_of, sync, write_durably
from pipeline.manifest import FILE_NAME, ShardFile, parse_manifest
from pipeline.storage import LocalStorage, ObjectStorage, open_storage


def local_shards(
    location: str, cache: Path | None = None, progress: Callable[[int, int], object] | None = None
) -> Path:
    """Return a folder that holds the shards of `location`: itself, where it is one, else a copy below `cache`.

    A copy is named after its manifest's hash, so it never goes stale; what is there already is not fetched again. Of
    processes on one host, one fetches and the others wait for it. `progress` is told (bytes done, bytes in all).
    `cache` defaults to $XDG_CACHE_HOME/alexnet or ~/.cache/alexnet.

    Raises DataError where the location cannot be read or its files are not those that its manifest names.
    """
    storage = open_storage(location)
    if isinstance(storage, LocalStorage):
        return storage.folder
    try:
        raw = storage.read(FILE_NAME)
    except OSError as error:
        raise DataError(f"{storage.location}: no manifest can be read there ({_reason(error)}); make the shards with "
                        "`alexnet preprocess SOURCE OUT`, or check address and credentials") from None
    manifest = parse_manifest(raw, f"{storage.location}: {FILE_NAME}")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet"
    folder = cache / hashlib.sha256(raw).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", wait=True):
            if not (folder / FILE_NAME).exists():
                _fetch(storage, manifest.files(), folder, progress)
                write_durably(folder / FILE_NAME, raw)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({_reason(error)}); name another place with --cache") from None
    return folder


def _fetch(
    storage: ObjectStorage, files: list[ShardFile], folder: Path, progress: Callable[[int, int], object] | None
) -> None:
    """Fetch what is not there yet; a file takes its name when it has been found whole."""
    total, done = sum(file.bytes for file in files), 0
    for file in files:
        path = folder / file.name
        if not path.exists():
            temporary = path.with_name(path.name + TEMPORARY)
            try:
                storage.download(file.name, temporary)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise
                raise DataError(f"{storage.location}: {file.name} cannot be read ({_reason(error)}); run again, it "
                                "goes on where it was") from None
            if temporary.stat().st_size != file.bytes or sha256_of(temporary) != file.sha256:
                temporary.unlink()
                raise DataError(f"{storage.location}: {file.name} is not the file that its manifest names; restore it "
                                "or preprocess again")
            sync(temporary)
            os.replace(temporary, path)
        done += file.bytes
        if progress is not None:
            progress(done, total)
    sync(folder)


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())[:200]
