"""The MD5 sums that ImageNet's publishers give for their archives."""

from __future__ import annotations

import hashlib
import os

from pipeline.errors import DataError
from pipeline.progress import Progress
from pipeline.sources.source import Source

# From the download pages of image-net.org, as torchvision (the first three) and datadings (the last) quote them.
KNOWN_MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    "winter21_whole.tar.gz": "ab313ce03179fd803a401b02c651c0a2",
}


def check_md5(source: Source, progress: Progress | None = None) -> dict[str, str]:
    """Return for each archive of `source`, by its path there: "as published", or "not known", and it is not read.

    `progress` is told (bytes read, bytes to be read, what is done). Raises DataError naming the first archive that
    cannot be read or has another sum.
    """
    verdicts = {os.path.relpath(path, source.root): "not known" for path in source.archives}
    known = [path for path in source.archives if path.name in KNOWN_MD5]
    done, path = 0, source.path
    try:
        total = sum(path.stat().st_size for path in known)
        for path in known:
            digest = hashlib.md5(usedforsecurity=False)
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, total, "checking MD5 (bytes)")
            if digest.hexdigest() != KNOWN_MD5[path.name]:
                raise DataError(f"{path}: its MD5 is {digest.hexdigest()}, published is {KNOWN_MD5[path.name]}: "
                                "download or copy it again")
            verdicts[os.path.relpath(path, source.root)] = "as published"
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    return verdicts
