"""Mend a finished data set: make those shards again that are damaged."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.errors import DataError, PreprocessError
from pipeline.files import sha256_of
from pipeline.manifest import Manifest, ShardFile
from pipeline.packing.plan import Plan, Shard
from pipeline.packing.receipts import load_receipt
from pipeline.progress import Progress
from pipeline.storage import LocalStorage, Storage


def damaged_shards(storage: Storage, plan: Plan, manifest: Manifest, progress: Progress) -> list[Shard]:
    """Return the shards that are missing or not what the manifest says: by size, and in a local folder by SHA-256.

    Raises DataError where the mean image is, which only packing all shards makes.
    """
    sizes = storage.sizes()
    total, done, damaged = sum(file.images for file in manifest.files()), 0, set()
    for file in manifest.files():
        if sizes.get(file.name) != file.bytes or (
            isinstance(storage, LocalStorage) and sha256_of(storage.folder / file.name) != file.sha256
        ):
            damaged.add(file.name)
        done += file.images
        progress(done, total, "checking")
    if manifest.mean.name in damaged:
        raise DataError(f"{storage.location}: {manifest.mean.name} is damaged, and takes all shards to make: "
                        "restore it, or choose another folder")
    return [shard for shard in plan.shards() if shard.name in damaged]


def check_mended(storage: Storage, manifest: Manifest, shards: Collection[Shard]) -> None:
    """Raise PreprocessError unless the shards that have been made again are the manifest's."""
    files: dict[str, ShardFile] = {file.name: file for file in manifest.files()}
    for shard in shards:
        if load_receipt(storage, shard).file != files[shard.name]:
            raise PreprocessError(f"{storage.location}: {shard.name}, made again, is not what the manifest says: the "
                                  "source or a decoder has changed; choose another folder")
