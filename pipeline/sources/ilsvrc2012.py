"""ILSVRC-2012 as published: three archives, read where they lie."""

from __future__ import annotations

from pipeline.sources.ilsvrc import Ilsvrc

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


class Ilsvrc2012(Ilsvrc):
    """The answers for its test images were never published."""

    year = 2012
    layout = "ilsvrc2012"
    LOOKS_LIKE = f"a folder with {TRAIN}, {VAL} and {DEVKIT}"
    train, val, devkit = TRAIN, VAL, DEVKIT
