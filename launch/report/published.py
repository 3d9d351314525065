"""Published errors to hold results against, in per cent."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    what: str
    views: str
    top1: float
    top5: float
    source: str


PUBLISHED = (
    Published("ILSVRC-2010 test", "ten views", 37.5, 17.0, "Krizhevsky et al. 2012, table 1"),
    Published("ILSVRC-2010 test", "centre", 39.0, 18.3, "Krizhevsky et al. 2012, section 4.1"),
    Published("ILSVRC-2012 validation", "ten views", 40.7, 18.2, "Krizhevsky et al. 2012, table 2"),
    Published("ILSVRC-2012 validation, Caffe's AlexNet", "centre", 42.9, 19.8, "Caffe's model zoo"),
    Published("ILSVRC-2012 validation, torchvision's variant", "centre", 43.5, 20.9, "torchvision's documentation"),
)
