"""Receipts: one a finished shard, with all that the manifest needs to know of it. A run that was stopped goes on after
the last of them. They lie in a folder of their own beside the shards until the manifest is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from pipeline.manifest import ShardFile
from pipeline.packing.plan import Shard
from pipeline.statistics import PixelStatistics
from pipeline.storage import Storage

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
            file.write(json.dumps(header).encode() + b"\n" + self.statistics.to_bytes())


def receipt_name(shard: Shard) -> str:
    return f"{FOLDER}/{shard.name}{RECEIPT}"


def load_receipt(storage: Storage, shard: Shard) -> Receipt:
    """Raises ValueError where it is damaged."""
    header, _, statistics = storage.read(receipt_name(shard)).partition(b"\n")
    try:
        fields = json.loads(header)
        file = fields["file"] and ShardFile(**fields["file"])
        counts = {int(label): int(count) for label, count in fields["class_counts"]}
        receipt = Receipt(file, counts, list(fields["rejected"]), PixelStatistics.from_bytes(statistics))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    images = file.images if file else 0
    if images + len(receipt.rejected) != len(shard.rows) or sum(counts.values()) != images:
        raise ValueError("its counts do not add up")
    return receipt


def finished(shards: Iterable[Shard], storage: Storage) -> Iterator[tuple[Shard, Receipt]]:
    """Yield those shards that need not be made again: the receipt is there, and the file too, whole."""
    sizes = storage.sizes() | storage.sizes(FOLDER)
    for shard in shards:
        if receipt_name(shard) in sizes:
            try:
                receipt = load_receipt(storage, shard)
            except (ValueError, FileNotFoundError):  # damaged, so that the shard is made anew; gone, as all is done
                continue
            if receipt.file is None or sizes.get(receipt.file.name) == receipt.file.bytes:
                yield shard, receipt
