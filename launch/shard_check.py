"""Are the shards what their manifest says? With a bar, for hashing all of ImageNet takes a while."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from pipeline.manifest import Manifest, check_files
from pipeline.shards import Stamp, stamp_of


def check_shards(shards: Path, manifest: Manifest, known: dict[str, Stamp] | None) -> dict[str, Stamp]:
    """Check names and sizes of all files, and the hashes of those that are not as in `known`; None: no hashes.

    Return the stamps of the files whose hash is known to be right. DataError names the first that is not what it was.
    """
    files, stamps = manifest.files(), {}
    with tqdm(total=sum(file.bytes for file in files), unit="B", unit_scale=True, desc="checking shards",
              disable=None, leave=False, dynamic_ncols=True) as bar:
        for file in files:
            # Before it is hashed: a change meanwhile would give it another.
            stamp = stamp_of(shards / file.name)
            check_files(shards, [file], known is not None and known.get(file.name) != stamp, bar.update)
            if known is not None:
                stamps[file.name] = stamp
    return stamps
