"""Published layouts of ImageNet and its kin, listed without unpacking; reading.py reads the images."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import DataError
from pipeline.sources.class_folders import ClassFolderArchive, ClassFolders
from pipeline.sources.hugging_face import HuggingFaceParquet
from pipeline.sources.ilsvrc2010 import Ilsvrc2010
from pipeline.sources.ilsvrc2012 import Ilsvrc2012
from pipeline.sources.kaggle import KaggleClsLoc
from pipeline.sources.source import Entry, Source
from pipeline.sources.synset_tars import SynsetTars
from pipeline.sources.tiny_imagenet import TinyImageNet
from pipeline.sources.webdataset import WebDataset

__all__ = ["Entry", "Source", "open_source"]

# The first that matches is taken: those that are known by exact names go before those that fit many a folder or tar.
LAYOUTS = (Ilsvrc2012, Ilsvrc2010, KaggleClsLoc, TinyImageNet, HuggingFaceParquet, SynsetTars, WebDataset, ClassFolders,
           ClassFolderArchive)


OTHER_COMPRESSIONS = (".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst", ".tar.lz4", ".7z", ".rar")


def open_source(path: Path) -> Source:
    """Recognise the layout of `path`, a folder or an archive, by what lies there.

    Raises DataError where it is none, or where something that belongs to it is missing or damaged.
    """
    path = Path(path)
    try:
        if path.is_dir():
            os.listdir(path)  # else a folder that may not be read would only look like an unknown one
        elif not path.exists():
            raise DataError(f"{path}: does not exist")
        elif path.suffix.lower() == ".zip":
            raise DataError(f"{path}: a zip archive; unzip it first, and give the folder")
        elif path.name.endswith(OTHER_COMPRESSIONS):
            raise DataError(f"{path}: compressed otherwise than with gzip; unpack it first")
        for layout in LAYOUTS:
            if layout.matches(path):
                return layout(path)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    known = "; ".join(f"{layout.layout}: {layout.LOOKS_LIKE}" for layout in LAYOUTS)
    raise DataError(f"{path}: not a known layout; known are {known}")
