"""Published layouts of ImageNet and its kin, one module each, read without unpacking."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import DataError
from pipeline.sources.class_folders import ClassFolderArchive, ClassFolders
from pipeline.sources.ilsvrc2012 import DEVKIT, TRAIN, VAL, Ilsvrc2012
from pipeline.sources.source import Source, SourceImage

__all__ = ["Source", "SourceImage", "open_source"]

LAYOUTS = (Ilsvrc2012, ClassFolders, ClassFolderArchive)  # the first that matches is taken


def open_source(path: Path) -> Source:
    """Recognise the layout of `path` by what lies there.

    Raises DataError where it is none, or where something that belongs to it is missing or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: does not exist")
    for layout in LAYOUTS:
        if layout.matches(path):
            return layout(path)
    raise DataError(
        f"{path}: not a known layout; known are ilsvrc2012 (a folder with {TRAIN}, {VAL} and {DEVKIT}) and "
        "class-folders (a folder or .tar file with train/<wnid>/ and val/<wnid>/)"
    )
