"""Pixels on a GPU: DALI does all of it, decoding too.

DALI's operators come in another order than pipeline.pixels says, with the same result: what can be done to bytes is
done before they become floats, which are four times as large, and one kernel flips, makes floats and adds the shift.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.backend import TensorListGPU

from pipeline.batches import Batch
from pipeline.manifest import IMAGE_SIZE
from pipeline.pixels.dali import ANCHOR, DECODING, PREFETCHED_BATCHES, STORED, Source, fed

# Graphs that take turns at the batches. Decoding waits for the GPU again and again within a batch: meanwhile others go
# on (34,000, 41,000 and 46,000 images/s with 1, 2 and 3 on an H200, alone).
GRAPHS = {"jpeg": 3, "raw": 1}
MOST_THREADS = 8  # of a graph; more wait for each other

# The share of the JPEG engine is DALI 2.4's default, pinned since it has changed between releases.
_DECODING = DECODING | {"device": "mixed", "hw_decoder_load": 0.65}


@pipeline_def(prefetch_queue_depth=PREFETCHED_BATCHES)
def _one_crop(source: Source, store: str, mean: np.ndarray, scale: float, crop: int):
    """Float pixels [crop, crop, 3]."""

    def feed() -> list:
        stored, batch = source()
        mirrored_x = 2 * IMAGE_SIZE - crop - batch.mean_anchors[:, 1]
        mean_x = np.where(batch.mean_flips, mirrored_x, batch.mean_anchors[:, 1])
        mean_anchors = np.stack([batch.mean_anchors[:, 0], mean_x], axis=1)
        return [stored, batch.anchors, batch.flips.astype(np.int32), -batch.shifts, mean_anchors]

    flips, shifts, window = (types.INT32, 0, ""), (types.FLOAT, 1, ""), {"shape": [crop, crop], "axes": [0, 1]}
    image, anchor, flip, minus_shift, mean_anchor = fed(feed, STORED[store], ANCHOR, flips, shifts, ANCHOR)
    if store == "jpeg":
        pixels = fn.decoders.image_slice(image, start=anchor, **window, **_DECODING)
    else:
        # Cut on the GPU: to cut an image takes a core three times as long as to send the whole of it.
        pixels = fn.slice(image.gpu(), start=anchor, **window)
    # Flip, make floats, add the shift and scale: (pixels - -shift) * scale.
    pixels = fn.crop_mirror_normalize(
        pixels, mirror=flip, mean=minus_shift, scale=scale, dtype=types.FLOAT, output_layout="HWC"
    )
    # The crop of the mean that belongs to a flipped image is cut from the mean's mirror image, which stands beside.
    mean_and_mirror = np.concatenate([mean, mean[:, ::-1]], axis=1) * np.float32(scale)
    return pixels - fn.slice(types.Constant(mean_and_mirror, device="gpu"), start=mean_anchor, **window)


@pipeline_def(prefetch_queue_depth=PREFETCHED_BATCHES)
def _several_crops(source: Source, store: str, mean: np.ndarray, scale: float, crop: int, views: Batch):
    """Float pixels [V, crop, crop, 3], the same V views of every image, those of the one image of `views`."""
    (image,) = fed(lambda: [source()[0]], STORED[store])
    image = fn.decoders.image(image, **_DECODING) if store == "jpeg" else image.gpu()
    crops, mean_crops = [], []
    for (y, x), flip in zip(views.anchors.tolist(), views.flips.tolist()):
        cut = fn.slice(image, start=[y, x], shape=[crop, crop], axes=[0, 1])
        crops.append(fn.flip(cut, horizontal=int(flip)))
    for (y, x), flip in zip(views.mean_anchors.tolist(), views.mean_flips.tolist()):
        mean_crop = mean[y : y + crop, x : x + crop] * np.float32(scale)
        mean_crops.append(mean_crop[:, ::-1] if flip else mean_crop)
    return fn.stack(*crops) * scale - types.Constant(np.stack(mean_crops), device="gpu")


class PixelsOnGpu:
    """The batches that `source` gives with their stored images, one by one, on `device`.

    `source(graph, graphs)` is the next batch of one of several graphs, which have them in turn.
    """

    def __init__(
        self, source: Callable[[int, int], tuple[list[np.ndarray], Batch]], store: str, mean: np.ndarray, scale: float,
        crop: int, views: Batch | None, batch_size: int, threads: int, device: torch.device,
    ):
        graphs = min(GRAPHS[store], threads) if views is None else 1  # ten views take much memory, and longer to use
        pixels = {"store": store, "mean": mean, "scale": scale, "crop": crop}
        settings = {"batch_size": batch_size, "num_threads": min(threads // graphs, MOST_THREADS),
                    "device_id": device.index}
        self._graphs = []
        for number in range(graphs):
            own_source = functools.partial(source, number, graphs)
            self._graphs.append(_one_crop(own_source, **pixels, **settings) if views is None else
                                _several_crops(own_source, **pixels, views=views, **settings))
            self._graphs[-1].build()
        self._turns = itertools.cycle(self._graphs)
        self._device = device

    def run(self) -> TensorListGPU:
        """Return DALI's output for the next batch; raise StopIteration where the source has."""
        # Given torch's stream, DALI makes that stream wait for the batch, not the host, and frees the memory in that
        # stream's order: what torch has queued on it may still read the batch.
        with torch.cuda.device(self._device):
            (output,) = next(self._turns).run(torch.cuda.current_stream())
        return output

    def pixels(self, output: TensorListGPU, batch: Batch) -> torch.Tensor:
        """Return float32 [N, crop, crop, 3] or [N, V, crop, crop, 3] of the output for `batch`."""
        # Nothing is copied. Under DALI's default (dynamic) executor an output is memory of its own that lives as long
        # as a tensor refers to it; the older executor would overwrite it two batches later.
        with torch.cuda.device(self._device):
            return torch.from_dlpack(output.as_tensor())
