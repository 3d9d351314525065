"""Which image goes into which shard, and where in it: a pure function of the source, the seed and the store.

All images of a split are shuffled across its classes, so that shards read one after the other are mixed already.
What a source stores in blocks (Parquet's row groups) is shuffled block by block, then image by image inside windows.
The order does not depend on the store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.errors import DataError
from pipeline.images import encoding_of
from pipeline.manifest import FORMAT, SPLITS
from pipeline.packing.index import Index
from pipeline.shards import ROWS_PER_SHARD
from pipeline.sources import Entry, Source

BLOCK_WINDOW = 4096  # images; a whole number of shards of either store, so that both have the same order

# First part of a generator's key. Changing one changes the order that a seed stands for.
_HOLD_OUT, _ORDER = range(2)


@dataclass(frozen=True)
class Packing:
    """What to make of a source."""

    store: str = "jpeg"  # or "raw"
    seed: int = 0  # of the order
    hold_out: float = 0.02  # share of the training images that become "val" where the source has none, 0-1


@dataclass(frozen=True)
class Shard:
    """One shard to be packed."""

    split: str
    number: int
    rows: np.ndarray  # int64 [images]: the rows of the split's index that belong in it, sorted
    places: np.ndarray  # int64 [images]: where in the shard each of them stands

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}.arrow"


class Plan:
    def __init__(self, source: Source, indices: dict[str, Index], packing: Packing):
        """`indices` are of the splits that `source` has. Raises DataError where nothing can be held out."""
        self.packing, self._indices = packing, indices
        self._rows_per_shard = ROWS_PER_SHARD[packing.store]
        rows = {split: np.arange(index.entries) for split, index in indices.items()}
        self.held_out = 0.0
        if "val" not in rows:
            if len(rows["train"]) < 2:
                raise DataError(f"{source.path}: a single training image and no val images: there is none to hold out; "
                                "add images to val/")
            self.held_out = packing.hold_out
            chosen = np.zeros(len(rows["train"]), bool)
            number = min(max(1, round(packing.hold_out * len(chosen))), len(chosen) - 1)
            chosen[self._generator(_HOLD_OUT).permutation(len(chosen))[:number]] = True
            rows |= {"train": np.flatnonzero(~chosen), "val": np.flatnonzero(chosen)}
        self._order = {split: self._shuffled(split, rows[split]) for split in SPLITS if split in rows}
        self.facts: dict[str, object] = {  # two runs that agree on them make the same shards
            "format": FORMAT, "layout": source.layout, "encoding": encoding_of(packing.store),
            **asdict(packing), "hold_out": self.held_out,
            "rows_per_shard": self._rows_per_shard,
            "classes": _hash([asdict(c) for c in source.classes]),
            "images": {split: index.sha256 for split, index in indices.items()},
        }

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._order)

    def images(self, split: str) -> int:
        return len(self._order[split])

    def shards(self) -> Iterator[Shard]:
        """Yield all shards, split after split."""
        for split, order in self._order.items():
            for number, first in enumerate(range(0, len(order), self._rows_per_shard)):
                rows = order[first : first + self._rows_per_shard]
                # Images lie in the shard as the shuffle has them; they are read in the order in which they lie in the
                # source, which a disk and a row group of Parquet like better.
                places = np.argsort(rows)
                yield Shard(split, number, rows[places], places)

    def entries(self, shard: Shard) -> list[Entry]:
        """Return the entry of each of the shard's rows."""
        return self._indices[shard.split if shard.split in self._indices else "train"].take(shard.rows)

    @property
    def sha256(self) -> str:
        """Of all that the shards are a function of."""
        return _hash(self.facts)

    def _shuffled(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Return `rows` in the order of packing."""
        index = self._indices[split if split in self._indices else "train"]
        generator = self._generator(_ORDER, SPLITS.index(split))
        blocks = index.blocks()[rows]
        if (blocks < 0).any():
            return rows[generator.permutation(len(rows))]
        _, block_of_row = np.unique(blocks, return_inverse=True)
        rank_of_block = generator.permutation(block_of_row.max() + 1)
        rows = rows[np.argsort(rank_of_block[block_of_row], kind="stable")]
        for first in range(0, len(rows), BLOCK_WINDOW):
            generator.shuffle(rows[first : first + BLOCK_WINDOW])
        return rows

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.packing.seed, spawn_key=key)))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
