"""Receipts: one a finished shard, with all that the manifest needs to know of it. A run that was stopped goes on after
the last of them. They lie in a folder of their own beside the shards until the manifest is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from pipeline.files import sha256_of
from pipeline.manifest import ShardFile
from pipeline.packing.plan import Shard
from pipeline.statistics import PixelStatistics
from pipeline.storage import LocalStorage, Storage

FOLDER = "packing"
PLAN = f"{FOLDER}/plan.json"
RECEIPT = ".receipt"


@dataclass
class Receipt:
    file: ShardFile | None  # None where no image of the shard could be read: then there is no file
    class_counts: dict[int, int]  # label: images
    rejected: list[dict]  # lines of rejected.jsonl
    statistics: PixelStatistics  # of the pixels before they were encoded

    def save(self, storage: Storage, shard: Shard) -> None:
        header = {"file": self.file and asdict(self.file), "class_counts": list(self.class_counts.items()),
                  "rejected": self.rejected}
        with storage.create(receipt_name(shard)) as file:
            body = json.dumps(header).encode() + b"\n" + self.statistics.to_bytes()
            file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def receipt_name(shard: Shard) -> str:
    return f"{FOLDER}/{shard.name}{RECEIPT}"


def load_receipt(storage: Storage, shard: Shard) -> Receipt:
    """Raises ValueError where it is not as it was written."""
    digest, _, body = storage.read(receipt_name(shard)).partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode():
        raise ValueError("not as it was written")
    header, _, statistics = body.partition(b"\n")
    fields = json.loads(header)
    file = fields["file"] and ShardFile(**fields["file"])
    counts = {int(label): int(count) for label, count in fields["class_counts"]}
    return Receipt(file, counts, fields["rejected"], PixelStatistics.from_bytes(statistics))


def finished(shards: Iterable[Shard], storage: Storage, hashes: bool = False) -> Iterator[tuple[Shard, Receipt]]:
    """Yield those shards that need not be made again: the receipt is there, and the file too, whole by its size, with
    `hashes` in a local folder by its SHA-256."""
    sizes = storage.sizes() | storage.sizes(FOLDER)
    for shard in shards:
        if receipt_name(shard) in sizes:
            try:
                receipt = load_receipt(storage, shard)
            except (ValueError, FileNotFoundError):  # damaged, so that the shard is made anew; gone, as all is done
                continue
            if receipt.file is None or sizes.get(shard.name) == receipt.file.bytes and not (
                hashes and isinstance(storage, LocalStorage)
                and sha256_of(storage.folder / shard.name) != receipt.file.sha256
            ):
                yield shard, receipt
