"""Pictures and a small set of class folders, with what breaks readers among them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.manifest import Manifest
from pipeline.packing.agreement import Share
from pipeline.packing.plan import Packing
from pipeline.packing.preprocess import preprocess
from pipeline.sources import open_source
from pipeline.storage import open_storage

WNIDS = ("n01", "n02", "n03")
REJECTED = {  # member: (split, wnid, what the reason holds)
    "train/n01/9_empty.JPEG": ("train", "n01", "empty file"),
    "train/n02/0_half.JPEG": ("train", "n02", ""),
    "train/n03/5_link.JPEG": ("train", "n03", "not a plain file"),
    "val/n02/0_text.JPEG": ("val", "n02", "not an image"),
}


def picture(seed: int, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    cells.resize((320, 240), Image.Resampling.BICUBIC).convert(mode).save(file, kind)
    return file.getvalue()


def write_folders(folder: Path) -> Path:
    """Twelve training and six validation images of three classes, and the four of REJECTED."""
    for split, each in (("train", 4), ("val", 2)):
        for label, wnid in enumerate(WNIDS):
            (folder / split / wnid).mkdir(parents=True)
            for i in range(each):
                (folder / split / wnid / f"{i + 1}.JPEG").write_bytes(picture(10 * label + i))
    (folder / "train/n01/3.JPEG").write_bytes(picture(91, "L"))
    (folder / "train/n02/3.JPEG").write_bytes(picture(92, "CMYK"))
    (folder / "train/n03/3.JPEG").write_bytes(picture(93, kind="PNG"))
    (folder / "train/n01/9_empty.JPEG").write_bytes(b"")
    (folder / "train/n02/0_half.JPEG").write_bytes(picture(94)[:3000])
    (folder / "train/n03/5_link.JPEG").symlink_to("nowhere")
    (folder / "val/n02/0_text.JPEG").write_bytes(b"not found")
    return folder


def pack(
    source: Path, out: Path | str, workers: int = 1, strict: bool = False, share: Share = Share(), progress=None,
    **packing,
) -> Manifest | None:
    return preprocess(open_source(source), open_storage(out), Packing(**packing), workers, strict, share, progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
