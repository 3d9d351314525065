"""What the graphs on the CPU and on the GPU have in common."""

from __future__ import annotations

import os
from collections.abc import Callable

# DALI keeps large host buffers for the next batch and gives smaller ones back to the system, which clears them when
# they are asked for again, batch after batch. Its limit, 32 MB, lies above a batch of cropped bytes. Read once, when
# DALI first allocates.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")

import numpy as np  # noqa: E402
from nvidia.dali import fn, types  # noqa: E402

from pipeline.batches import Batch  # noqa: E402

PREFETCHED_BATCHES = 2  # of a graph

# The CPU decoder interpolates colours, as Pillow does, bit for bit; fancy upsampling makes GPU decoders interpolate
# too. The packer has settled every image's orientation.
DECODING = {"output_type": types.RGB, "jpeg_fancy_upsampling": True, "adjust_orientation": False}

Source = Callable[[], tuple[list[np.ndarray], Batch]]  # the next batch and its stored images
Input = tuple[types.DALIDataType, int, str]  # type, dimensions and layout of a sample
ANCHOR: Input = (types.INT32, 1, "")
STORED: dict[str, Input] = {"raw": (types.UINT8, 3, "HWC"), "jpeg": (types.UINT8, 1, "")}


def fed(feed: Callable[[], list], *inputs: Input) -> list:
    """The inputs of a graph: `feed` returns an array, or a list of views, for each."""
    dtype, ndim, layout = (list(column) for column in zip(*inputs))
    # no_copy: stored images are read where the shard is mapped. DALI refers to the arrays until it is done with them.
    return fn.external_source(
        feed, num_outputs=len(inputs), batch=True, no_copy=True, dtype=dtype, ndim=ndim, layout=layout
    )
