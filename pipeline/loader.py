"""Batches of pixels for training and evaluation, on the CPU or a GPU: pipeline.graph over the images of a split.

pipeline.batches says which images, crops, flips and shifts.

Shapes: N images of a batch, V views of one image.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipeline.batches import CENTRE, CROP, TEN_VIEWS, TrainingBatches
from pipeline.errors import DataError
from pipeline.graph import OneViewFeed, graph
from pipeline.manifest import IMAGE_SIZE
from pipeline.shards import ShardImages


class _Source:
    """What DALI calls for the input of each batch. It knows no pipeline: DALI holds it, and they would hold each other.

    `feeds` gives pairs of (indices [N], what the graph is fed for them); its StopIteration tells DALI of the end.
    """

    def __init__(self, feeds: Iterator[tuple[np.ndarray, list]]):
        self._feeds = feeds
        self.under_way: deque[np.ndarray] = deque()  # indices of what DALI has not returned yet, oldest first
        self.seconds = 0.0

    def __call__(self) -> list:
        start = time.perf_counter()
        indices, feed = next(self._feeds)
        self.under_way.append(indices)
        self.seconds += time.perf_counter() - start
        return feed


class _Pipeline:
    """One run of the graph over `feeds`."""

    def __init__(
        self,
        images: ShardImages,
        feeds: Iterator[tuple[np.ndarray, list]],
        batch_size: int,
        threads: int,
        device: torch.device,
        **settings,
    ):
        self._images, self._device, self._on_gpu = images, device, device.type == "cuda"
        self.source = _Source(feeds)
        self._pipeline = graph(
            batch_size=batch_size,
            num_threads=threads,
            device_id=device.index,
            source=self.source,
            store=images.store,
            on_gpu=self._on_gpu,
            **settings,
        )
        self._pipeline.build()

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (pixels float32 [N * V, 3, crop, crop], labels int64 [N]); raise StopIteration after the last."""
        if self._pipeline is None:
            raise ValueError("the loader is closed")
        try:
            pixels = self._run()
        except RuntimeError as error:
            self.close()  # DALI calls the pipeline invalid now, and does not say which image it was
            suspects = [i for indices in self.source.under_way for i in indices]
            jpegs = suspects if self._images.store == "jpeg" else []
            broken = [self._images.name(i) for i in jpegs if not _decodes(self._images.stored(i))]
            if not broken:
                raise
            raise DataError(
                f"{', '.join(broken)}: the stored JPEG cannot be decoded, so a shard is damaged: "
                "find it with `alexnet verify`, then restore it or preprocess again"
            ) from error
        labels = torch.from_numpy(self._images.labels[self.source.under_way.popleft()].astype(np.int64))
        if self._on_gpu:  # from pinned memory, or the host would wait here for all work that the GPU has
            labels = labels.pin_memory().to(self._device, non_blocking=True)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])  # N * V, H, W, C
        return pixels.permute(0, 3, 1, 2), labels

    def _run(self) -> torch.Tensor:
        # Nothing is copied. Under DALI's default (dynamic) executor an output is memory of its own that lives as long
        # as a tensor refers to it; the older executor would overwrite it two batches later.
        if not self._on_gpu:
            (output,) = self._pipeline.run()
            return torch.from_dlpack(output.as_tensor())
        # Given torch's stream, DALI makes that stream wait for the batch, not the host, and frees the memory in that
        # stream's order: what torch has queued on it may still read the batch.
        with torch.cuda.device(self._device):
            (output,) = self._pipeline.run(torch.cuda.current_stream())
            return torch.from_dlpack(output.as_tensor())

    def close(self) -> None:
        """Stop the threads and free the memory, but for what returned tensors still refer to."""
        self._pipeline = None


def _decodes(jpeg: np.ndarray) -> bool:
    """Whether DALI's CPU decoder makes a whole stored image of it."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode():
        (data,) = fn.external_source(
            source=lambda: [[jpeg]], batch=True, no_copy=True, num_outputs=1, dtype=[types.UINT8], ndim=[1]
        )
        return fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False)

    try:
        return decode().run()[0].as_tensor().shape() == [1, IMAGE_SIZE, IMAGE_SIZE, 3]
    except RuntimeError:
        return False


def _device(device: str | torch.device) -> torch.device:
    """With its index where it is a GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return torch.device(device.type)


class TrainingLoader:
    """An endless iterator over the steps of a run from `start_step` on, through all epochs.

    Yields (pixels, labels): float32 [N, 3, 224, 224] in channels_last memory format, in levels of 0-255 less the mean,
    times `scale`; int64 [N]. Both lie on `device` ("cpu", "cuda", "cuda:1"; a torch.device) and belong to the caller:
    later batches never overwrite them. On a GPU they are for the stream that was current when the batch was asked for.

    Global step g is step g % steps_per_epoch of epoch g // steps_per_epoch in `batches`, so a loader that starts at
    step g continues another's batches exactly. The next batches are prepared by `threads` threads while the caller
    computes; `wait_s` adds up the seconds that the caller had to wait for them nevertheless, `source_s` those in which
    Python found the images and drew crops, flips and shifts (in the caller's thread: they are a part of `wait_s`).

    `mean` is float32 [256, 256, 3], RGB in 0-255. Raises DataError for a mean of another shape, and in iteration where
    a stored image cannot be decoded. Use it in a `with` statement, or call close(), to release DALI's threads.
    """

    def __init__(
        self,
        images: ShardImages,
        mean: np.ndarray,
        batches: TrainingBatches,
        device: str | torch.device = "cpu",
        scale: float = 1.0,
        threads: int = 1,
        start_step: int = 0,
    ):
        if batches.images != len(images) or batches.image_size != IMAGE_SIZE:
            raise ValueError(f"batches of {batches.images} images of {batches.image_size} pixels for {len(images)}")
        self.wait_s = 0.0
        mean, device = _checked(mean), _device(device)
        feed = OneViewFeed(mean, scale, batches.crop, device.type == "cuda")
        feeds = _training_feeds(images, batches, start_step, feed)
        settings = {"mean": mean, "scale": scale, "crop": batches.crop, "views": None}
        self._pipeline = _Pipeline(images, feeds, batches.batch_size, threads, device, **settings)

    @property
    def source_s(self) -> float:
        return self._pipeline.source.seconds

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.perf_counter()
        batch = self._pipeline.next()
        self.wait_s += time.perf_counter() - start
        return batch

    def close(self) -> None:
        self._pipeline.close()

    def __enter__(self) -> TrainingLoader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _training_feeds(
    images: ShardImages, batches: TrainingBatches, step: int, feed: OneViewFeed
) -> Iterator[tuple[np.ndarray, list]]:
    while True:
        batch = batches.at(*divmod(step, batches.steps_per_epoch))
        stored = images.stored_batch(batch.indices)
        yield batch.indices, feed.of(stored, batch.anchors, batch.flips, batch.shifts)
        step += 1


class EvaluationLoader:
    """Every image exactly once, in stored order, as often as it is iterated; the last batch is smaller if need be.

    Each iteration starts afresh, and yields (pixels, labels) as TrainingLoader does, without flips of chance or colour
    shifts: labels int64 [N], pixels float32 [N * V, 3, 224, 224] with the V views of one image next to each other,
    V = 1 for views="centre" (the centre crop) and V = 10 for views="ten" (pipeline.batches.TEN_VIEWS, in that order).
    len() is the number of batches. An image is decoded once however many its views.
    """

    def __init__(
        self,
        images: ShardImages,
        mean: np.ndarray,
        views: str = "centre",
        batch_size: int = 128,
        device: str | torch.device = "cpu",
        scale: float = 1.0,
        threads: int = 1,
    ):
        if views not in ("centre", "ten"):
            raise ValueError(f"views {views!r}: centre or ten")
        self._images, self._mean, self._views = images, _checked(mean), TEN_VIEWS if views == "ten" else None
        self._batch_size, self._device, self._scale, self._threads = batch_size, _device(device), scale, threads

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        settings = {"mean": self._mean, "scale": self._scale, "crop": CROP, "views": self._views}
        pipeline = _Pipeline(self._images, self._feeds(), self._batch_size, self._threads, self._device, **settings)
        try:
            while True:
                try:
                    batch = pipeline.next()
                except StopIteration:
                    return
                yield batch
        finally:  # also when the iteration is abandoned
            pipeline.close()

    def _feeds(self) -> Iterator[tuple[np.ndarray, list]]:
        if self._views is None:
            one_view = OneViewFeed(self._mean, self._scale, CROP, self._device.type == "cuda")
        for first in range(0, len(self._images), self._batch_size):
            indices = np.arange(first, min(first + self._batch_size, len(self._images)))
            stored = self._images.stored_batch(indices)
            if self._views is not None:
                yield indices, [stored]
            else:
                anchors, flips = CENTRE.anchors.repeat(len(indices), axis=0), CENTRE.flips.repeat(len(indices))
                yield indices, one_view.of(stored, anchors, flips, np.zeros((len(indices), 3)))


def _checked(mean: np.ndarray) -> np.ndarray:
    if mean.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or mean.dtype != np.float32:
        raise DataError(f"mean image: {mean.dtype} {list(mean.shape)} and not float32 "
                        f"{[IMAGE_SIZE, IMAGE_SIZE, 3]}: preprocess again")
    return mean
