"""Chunks of images, as workers get them."""

from __future__ import annotations

import pytest

from pipeline.packing.chunks import CHUNK_BYTES, CHUNK_IMAGES, chunks
from pipeline.sources import Entry


def listed(sizes: list[int], blocks: list[int] | None = None) -> list[Entry]:
    return [Entry("a.tar", str(i), 0, size=size, block=block)
            for i, (size, block) in enumerate(zip(sizes, blocks or [-1] * len(sizes)))]


def lengths(entries: list[Entry]) -> list[int]:
    parts = list(chunks(entries))
    assert [entry for part in parts for entry in entries[part]] == entries
    return [part.stop - part.start for part in parts]


def test_chunks_are_bounded_in_number():
    assert lengths(listed([1] * (2 * CHUNK_IMAGES + 3))) == [CHUNK_IMAGES, CHUNK_IMAGES, 3]


def test_chunks_are_bounded_in_bytes():
    third = CHUNK_BYTES // 3
    assert lengths(listed([third] * 7)) == [3, 3, 1]
    assert lengths(listed([1, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES, 1])) == [1, 1, 1, 1]  # each too large for company


@pytest.mark.parametrize("block_rows, expected", [
    (100, [100, 100, 100]), (10, [70, 70, 70, 70, 20]), (300, [128, 128, 44]), (64, [64, 64, 64, 64, 44]),
])
def test_a_block_is_cut_into_few_chunks(block_rows, expected):
    assert CHUNK_IMAGES == 64
    assert lengths(listed([0] * 300, [i // block_rows for i in range(300)])) == expected
