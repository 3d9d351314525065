"""What packing ends with: the lists and sums over all shards, and the manifest."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re

import numpy as np

from pipeline.errors import DataError, PreprocessError
from pipeline.images import encoding_of
from pipeline.manifest import FILE_NAME, REJECTED_NAME, SPLITS, Manifest, ShardFile, Split
from pipeline.packing.plan import Plan
from pipeline.packing.receipts import FOLDER, load_receipt
from pipeline.packing.rejections import refuse_rejected
from pipeline.sources import Source
from pipeline.statistics import PixelStatistics
from pipeline.storage import Storage

MEAN_NAME = "mean.npy"
_NAMES = "|".join(map(re.escape, (MEAN_NAME, REJECTED_NAME, FILE_NAME)))
_SHARD, _PARTIAL = rf"({'|'.join(SPLITS)})-\d{{5,}}\.arrow", r"(\.[0-9a-f]{8}\.tmp)?"
OWN_FILES = re.compile(
    rf"({_SHARD}|{_NAMES}){_PARTIAL}|{FOLDER}/"
    rf"|{FOLDER}/(plan\.json|{_SHARD}\.receipt|unpacked-\d+-\d+\.tar|rank-\d+\.lock){_PARTIAL}"
)

log = logging.getLogger(__name__)


def finish(source: Source, storage: Storage, plan: Plan, strict: bool) -> Manifest:
    """Sum up the receipts of all shards; write rejected.jsonl, the mean image and, last, the manifest.

    With `strict`, raise DataError for a rejected image, before anything is written.
    """
    statistics = PixelStatistics()
    counts = {split: np.zeros(len(source.classes), np.int64) for split in plan.splits}
    files: dict[str, list[ShardFile]] = {split: [] for split in plan.splits}
    rejected: dict[str, list[dict]] = {split: [] for split in plan.splits}
    for shard in plan.shards():
        try:
            receipt = load_receipt(storage, shard)
        except ValueError as error:
            raise PreprocessError(f"{storage.location}: the receipt of {shard.name} is damaged ({error}); run again, "
                                  "it goes on where it was") from None
        if strict:
            refuse_rejected(receipt.rejected)
        for label, count in receipt.class_counts.items():
            counts[shard.split][label] += count
        files[shard.split] += [receipt.file] if receipt.file else []
        rejected[shard.split] += receipt.rejected
        if shard.split == "train":
            statistics.merge(receipt.statistics)

    splits = {}
    for split in plan.splits:
        packed, left_out = int(counts[split].sum()), rejected[split]
        if packed + len(left_out) != plan.images(split):
            raise AssertionError(f"{split}: {packed} read and {len(left_out)} rejected of {plan.images(split)} found")
        if not packed:
            example = "; the first, {member}: {reason}".format(**left_out[0])
            raise DataError(f"{source.path}: no usable {split} image: {plan.images(split)} found{example}")
        splits[split] = Split(packed, len(left_out), counts[split].tolist(), files[split])
    assert statistics.images == splits["train"].images

    storage.remove_temporary()
    lines = [json.dumps(entry) + "\n" for split in plan.splits for entry in rejected[split]]
    _write(storage, REJECTED_NAME, "".join(lines).encode())
    mean = io.BytesIO()
    np.save(mean, statistics.mean_image())
    _write(storage, MEAN_NAME, mean.getvalue())
    manifest = Manifest(
        layout=source.layout,
        store=plan.packing.store,
        encoding=encoding_of(plan.packing.store),
        seed=plan.packing.seed,
        held_out=plan.held_out,
        plan=plan.sha256,
        classes=source.classes,
        splits=splits,
        mean=ShardFile(MEAN_NAME, statistics.images, len(mean.getvalue()), hashlib.sha256(mean.getvalue()).hexdigest()),
        rgb_mean=statistics.rgb_mean().tolist(),
        rgb_covariance=statistics.rgb_covariance().tolist(),
    )
    manifest.save(storage)
    for split, of_class in counts.items():
        empty = [c.wnid for c, count in zip(manifest.classes, of_class) if not count]
        if empty:
            listed = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
            log.warning("%d of %d classes have no usable %s image: %s", len(empty), len(counts[split]), split, listed)
    return manifest


def _write(storage: Storage, name: str, data: bytes) -> None:
    with storage.create(name) as file:
        file.write(data)
