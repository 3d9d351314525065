"""Pixels on the CPU: DALI decodes and cuts, pipeline.pixels.finish makes floats of the bytes.

Shapes: N images of a batch, K crops of them.
"""

from __future__ import annotations

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.backend import TensorListCPU

from pipeline.batches import Batch
from pipeline.manifest import IMAGE_SIZE
from pipeline.pixels.dali import ANCHOR, DECODING, PREFETCHED_BATCHES, STORED, Source, fed
from pipeline.pixels.finish import Finisher


@pipeline_def(prefetch_queue_depth=PREFETCHED_BATCHES)
def _crops(source: Source, crop: int):
    """uint8 [crop, crop, 3], cut out of stored JPEGs."""

    def feed() -> list:
        stored, batch = source()
        return [stored, batch.anchors]

    jpeg, anchor = fed(feed, STORED["jpeg"], ANCHOR)
    return fn.decoders.image_slice(jpeg, start=anchor, shape=[crop, crop], axes=[0, 1], **DECODING)


@pipeline_def(prefetch_queue_depth=PREFETCHED_BATCHES)
def _whole_images(source: Source, store: str):
    """uint8 [256, 256, 3]."""
    (image,) = fed(lambda: [source()[0]], STORED[store])
    if store == "raw":  # the copy brings pixels from the disk ahead of their use; cutting takes DALI four times as long
        return fn.copy(image)
    return fn.decoders.image_slice(image, start=[0, 0], shape=[IMAGE_SIZE, IMAGE_SIZE], axes=[0, 1], **DECODING)


class PixelsOnCpu:
    """The batches that `source` gives with their stored images, one by one."""

    def __init__(
        self, source: Source, store: str, mean: np.ndarray, scale: float, crop: int, views: Batch | None,
        batch_size: int, threads: int, device: torch.device,
    ):
        settings = {"batch_size": batch_size, "num_threads": threads, "device_id": None}
        if store == "jpeg" and views is None:
            self._graph = _crops(source, crop, **settings)
        else:
            self._graph = _whole_images(source, store, **settings)
        self._graph.build()
        self._finisher = Finisher(mean, scale, crop, threads)

    def run(self) -> TensorListCPU:
        """Return DALI's output for the next batch; raise StopIteration where the source has."""
        (output,) = self._graph.run()
        return output

    def pixels(self, output: TensorListCPU, batch: Batch) -> torch.Tensor:
        """Return float32 [K, crop, crop, 3] of the output for `batch`."""
        return self.finish(torch.from_dlpack(output.as_tensor()).numpy(), batch)

    def finish(self, images: np.ndarray, batch: Batch) -> torch.Tensor:
        """Return the same of the output's bytes."""
        return self._finisher.finish(images, batch)
