"""Batches of pixels for training and evaluation, on the CPU or a GPU.

pipeline.batches says which images, crops, flips and shifts; pipeline.pixels makes pixels of them.

Shapes: N images of a batch, V views of one image.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipeline.batches import CROP, Batch, TrainingBatches, views_of
from pipeline.errors import DataError
from pipeline.manifest import IMAGE_SIZE
from pipeline.mean import checked
from pipeline.pixels.shared import PictureSwap, SharedPixels, half_of, part_of
from pipeline.shards import ShardImages

EVERYTHING = slice(None)


class _Source:
    """What DALI's graphs call for each batch and its stored images. It knows no graph: that holds it, and they would
    hold each other.

    Several graphs have the batches in turn. The StopIteration of `batches` tells DALI of the end.
    """

    def __init__(self, images: ShardImages, batches: Iterator[Batch], part: slice):
        self._images, self._batches, self._part = images, batches, part
        self.under_way: deque[Batch] = deque()  # drawn, and what DALI has not returned yet, oldest first
        self.seconds = 0.0  # of processor time
        self._drawn = 0
        self._waiting: dict[int, deque[Batch]] = {}  # batches of graphs that have not asked for them yet

    def __call__(self, graph: int = 0, graphs: int = 1) -> tuple[list[np.ndarray], Batch]:
        """Return the next batch of `graph` of so many: number graph, graph + graphs, ..."""
        start = time.thread_time()
        mine = self._waiting.setdefault(graph, deque())
        while not mine:
            batch = next(self._batches)
            self.under_way.append(batch)
            self._waiting.setdefault(self._drawn % graphs, deque()).append(batch)
            self._drawn += 1
        part = part_of(mine.popleft(), self._part)
        stored = self._images.stored_batch(part.indices)
        self.seconds += time.thread_time() - start
        return stored, part


class _Delivery:
    """The pixels and labels of `batches`, one by one: each image has the crops of `views`, or (None) one of its own."""

    def __init__(
        self, images: ShardImages, batches: Iterator[Batch], mean: np.ndarray, scale: float, crop: int,
        views: Batch | None, batch_size: int, threads: int, device: torch.device, swap: PictureSwap | None = None,
    ):
        self._images, self._device = images, device
        if device.type == "cuda" or images.store == "raw" or batch_size % 2:
            swap = None  # nothing is decoded, or not where it would be swapped
        part = half_of(batch_size, swap.rank) if swap else EVERYTHING
        if device.type == "cuda":  # numba, which the CPU's way needs, is imported only where it is used
            from pipeline.pixels.on_gpu import PixelsOnGpu as Pixels
        else:
            from pipeline.pixels.on_cpu import PixelsOnCpu as Pixels
        self.source = _Source(images, batches, part)
        self._pixels = Pixels(self.source, images.store, mean, scale, crop, views,
                              batch_size // 2 if swap else batch_size, threads, device)
        if swap:
            self._pixels = SharedPixels(self._pixels, swap, batch_size, crop)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (pixels float32 [N * V, 3, crop, crop], labels int64 [N]); raise StopIteration after the last."""
        if self._pixels is None:
            raise ValueError("the loader is closed")
        try:
            output = self._pixels.run()
        except RuntimeError as error:
            self.close()  # DALI calls the pipeline invalid now, and does not say which image it was
            suspects = [i for batch in self.source.under_way for i in batch.indices]
            jpegs = suspects if self._images.store == "jpeg" else []
            broken = [self._images.name(i) for i in jpegs if not _decodes(self._images.stored(i))]
            if not broken:
                raise
            raise DataError(
                f"{', '.join(broken)}: the stored JPEG cannot be decoded, so a shard is damaged: "
                "find it with `alexnet verify`, then restore it or preprocess again"
            ) from error
        batch = self.source.under_way.popleft()
        pixels = self._pixels.pixels(output, batch)
        labels = torch.from_numpy(self._images.labels[batch.indices].astype(np.int64))
        if self._device.type == "cuda":  # from pinned memory, or the host would wait here for all work that the GPU has
            labels = labels.pin_memory().to(self._device, non_blocking=True)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])  # N * V, H, W, C
        return pixels.permute(0, 3, 1, 2), labels

    def close(self) -> None:
        """Stop the threads and free the memory, but for what returned tensors still refer to."""
        self._pixels = None


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
    step g continues another's batches exactly. The next batches are prepared by up to `threads` threads while the
    caller computes; `wait_s` adds up the seconds that it had to wait for them nevertheless, `source_s` the processor
    time in which Python found the images and drew crops, flips and shifts (in the caller's thread).

    With `swap` two processes share the decoding of JPEGs on the CPU; both must ask for the same batches, of an even
    size. The batches are the same with it and without. With `part` (i, n) N is the n-th part of the batches' size, and
    the images are the i-th of n equal parts of each batch.

    `mean` is float32 [256, 256, 3], RGB in 0-255. Raises DataError for a mean of another shape, and in iteration where
    a stored image cannot be decoded. Use it in a `with` statement, or call close(), to release DALI's threads.
    ValueError for batches that have no n equal parts.
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
        swap: PictureSwap | None = None,
        part: tuple[int, int] = (0, 1),
    ):
        if batches.batch_size % part[1]:
            raise ValueError(f"batches of {batches.batch_size} images in {part[1]} parts")
        if batches.images != len(images) or batches.image_size != IMAGE_SIZE:
            raise ValueError(f"batches of {batches.images} images of {batches.image_size} pixels for {len(images)}")
        self.wait_s = 0.0
        self._delivery = _Delivery(
            images, _from_step(batches, start_step, part), checked(mean), scale, batches.crop, None,
            batches.batch_size // part[1], threads, _device(device), swap,
        )

    @property
    def source_s(self) -> float:
        return self._delivery.source.seconds

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.perf_counter()
        batch = self._delivery.next()
        self.wait_s += time.perf_counter() - start
        return batch

    def close(self) -> None:
        self._delivery.close()

    def __enter__(self) -> TrainingLoader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _from_step(batches: TrainingBatches, step: int, part: tuple[int, int]) -> Iterator[Batch]:
    images = batches.batch_size // part[1]
    own = slice(part[0] * images, (part[0] + 1) * images)
    # Several at a time: between two batches, decoding drives all that drawing needs from the processor's caches, so
    # that the first one drawn takes many times as long as those that follow at once.
    for first in itertools.count(step, 8):
        yield from [part_of(batches.at(*divmod(step, batches.steps_per_epoch)), own)
                    for step in range(first, first + 8)]


class EvaluationLoader:
    """Every image exactly once, in stored order, as often as it is iterated; the last batch is smaller if need be.

    Each iteration starts afresh, and yields (pixels, labels) as TrainingLoader does, without flips of chance or colour
    shifts: labels int64 [N], pixels float32 [N * V, 3, 224, 224] with the V views of one image next to each other,
    V = `views` is 1 (the centre) or 10, in the order of pipeline.batches.views_of.
    len() is the number of batches. An image is decoded once however many its views. `mean_at` as in
    pipeline.batches.placed. With `part` (i, n) it is every image of the i-th of n parts.
    """

    def __init__(
        self,
        images: ShardImages,
        mean: np.ndarray,
        views: int = 1,
        batch_size: int = 128,
        device: str | torch.device = "cpu",
        scale: float = 1.0,
        threads: int = 1,
        mean_at: str = "crop",
        crop: int = CROP,
        part: tuple[int, int] = (0, 1),
    ):
        self._images, self._mean, self._views = images, checked(mean), views_of(views, crop)
        self._part = range(*(len(images) * i // part[1] for i in (part[0], part[0] + 1)))
        self._mean_at = mean_at
        self.batch_size, self._device, self._scale, self._threads = batch_size, _device(device), scale, threads

    def __len__(self) -> int:
        return -(-len(self._part) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        several = self._views.of(np.arange(1), self._mean_at) if len(self._views.flips) > 1 else None
        delivery = _Delivery(
            self._images, self._batches(), self._mean, self._scale, self._views.crop, several, self.batch_size,
            self._threads, self._device,
        )
        try:
            while True:
                try:
                    batch = delivery.next()
                except StopIteration:
                    return
                yield batch
        finally:  # also when the iteration is abandoned
            delivery.close()

    def _batches(self) -> Iterator[Batch]:
        for first in range(0, len(self._part), self.batch_size):
            yield self._views.of(np.array(self._part[first : first + self.batch_size]), self._mean_at)
