"""Batches of pixels: one DALI graph for training and evaluation, on the CPU or a GPU.

What is done to an image, in this order (recipes `notes` and `paper`): decode, cut the crop, subtract the mean image's
part at the crop's own offset, add the colour shift, flip, multiply by `scale`. DALI draws nothing at random:
pipeline.batches says which images, crops, flips and shifts.

On the CPU the order of the operators is another, with the same result: flipping bytes and adding the shift where they
become floats costs a quarter less than cast, subtract, add and flip one after the other, in all about two decodes.

Shapes: N images of a batch, V views of one image.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipeline.batches import CENTRE, CROP, TEN_VIEWS, TrainingBatches, Views
from pipeline.errors import DataError
from pipeline.manifest import IMAGE_SIZE
from pipeline.shards import ShardImages

PREFETCHED_BATCHES = 2


@pipeline_def(prefetch_queue_depth=PREFETCHED_BATCHES)
def _graph(source, mean: np.ndarray, scale: float, crop: int, views: Views | None, on_gpu: bool):
    """Float pixels [crop, crop, 3], or [V, crop, crop, 3] where `views` has several, of what `source` feeds."""
    # no_copy: the JPEG bytes are read where the shard is mapped. DALI refers to the arrays until it is done with them.
    feed = {"source": source, "batch": True, "no_copy": True}
    # The CPU decoder interpolates colours, as Pillow does, bit for bit; fancy upsampling makes GPU decoders interpolate
    # too. The packer has settled every image's orientation. The share of the JPEG engine is DALI 2.4's default, pinned
    # since it has changed between releases.
    decode = {"output_type": types.RGB, "jpeg_fancy_upsampling": True, "adjust_orientation": False}
    decode |= {"device": "mixed", "hw_decoder_load": 0.65} if on_gpu else {"device": "cpu"}
    device = "gpu" if on_gpu else "cpu"
    window = {"shape": [crop, crop], "axes": [0, 1]}
    mean = mean * np.float32(scale)

    if views is not None:
        (jpeg,) = fn.external_source(num_outputs=1, dtype=[types.UINT8], ndim=[1], **feed)
        image = fn.decoders.image(jpeg, **decode)
        crops = [fn.slice(image, start=anchor.tolist(), **window) for anchor in views.anchors]
        pixels = fn.stack(*(fn.flip(one, horizontal=int(flip)) for one, flip in zip(crops, views.flips)))
        mean_views = np.stack([_cut(mean, anchor, flip, crop) for anchor, flip in zip(*views)])
        return pixels * scale - types.Constant(mean_views, device=device)

    jpeg, anchor, mean_anchor, flip, shift = fn.external_source(
        num_outputs=5,
        dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, types.FLOAT],
        ndim=[1, 1, 1, 0, 1],
        **feed,
    )
    pixels = fn.decoders.image_slice(jpeg, start=anchor, **window, **decode)
    # One pass over the bytes flips, makes floats, adds the shift and scales: (pixels - -shift) * scale.
    pixels = fn.crop_mirror_normalize(
        pixels, mirror=flip, mean=-shift, scale=scale, dtype=types.FLOAT, output_layout="HWC"
    )
    # The crop of the mean that belongs to a flipped image is cut from the mean's mirror image, which stands beside it.
    mean_and_mirror = types.Constant(np.concatenate([mean, mean[:, ::-1]], axis=1), device=device)
    return pixels - fn.slice(mean_and_mirror, start=mean_anchor, **window)


def _cut(mean: np.ndarray, anchor: np.ndarray, flip: bool, crop: int) -> np.ndarray:
    y, x = anchor
    part = mean[y : y + crop, x : x + crop]
    return part[:, ::-1] if flip else part


def _one_view_feed(images: ShardImages, indices, anchors, flips, shifts, crop: int) -> list:
    mirrored_x = 2 * IMAGE_SIZE - crop - anchors[:, 1]
    mean_anchors = np.stack([anchors[:, 0], np.where(flips, mirrored_x, anchors[:, 1])], axis=1)
    return [
        [images.encoded(i) for i in indices],
        anchors.astype(np.int32),
        mean_anchors.astype(np.int32),
        flips.astype(np.int32),
        shifts.astype(np.float32),
    ]


class _Pipeline:
    """One run of the graph over `feeds`, pairs of (indices [N], what the graph's source returns for them)."""

    def __init__(
        self,
        images: ShardImages,
        feeds: Iterable[tuple[np.ndarray, list]],
        batch_size: int,
        threads: int,
        device: str | torch.device,
        **graph,
    ):
        self._images, self._device = images, torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        if self._on_gpu and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        feeds, under_way = iter(feeds), deque()

        # A closure and not a method: DALI holds it, and a reference from it to self would keep both alive.
        def source():
            indices, feed = next(feeds)  # its StopIteration is how DALI learns of the end
            under_way.append(indices)
            return feed

        self._under_way = under_way  # indices of the batches that DALI has been fed and has not returned, oldest first
        device_id = self._device.index if self._on_gpu else None
        self._pipeline = _graph(
            batch_size=batch_size, num_threads=threads, device_id=device_id, source=source, on_gpu=self._on_gpu, **graph
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
            suspects = [i for indices in self._under_way for i in indices]
            broken = [self._images.name(i) for i in suspects if not _decodes(self._images.encoded(i))]
            if not broken:
                raise
            raise DataError(
                f"{', '.join(broken)}: the stored JPEG cannot be decoded, so a shard is damaged: "
                "find it with `alexnet verify`, then restore it or preprocess again"
            ) from error
        labels = torch.from_numpy(self._images.labels[self._under_way.popleft()].astype(np.int64))
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


class TrainingLoader:
    """An endless iterator over the steps of a run from `start_step` on, through all epochs.

    Yields (pixels, labels): float32 [N, 3, 224, 224] in channels_last memory format, in levels of 0-255 less the mean,
    times `scale`; int64 [N]. Both lie on `device` ("cpu", "cuda", "cuda:1"; a torch.device) and belong to the caller:
    later batches never overwrite them. On a GPU they are for the stream that was current when the batch was asked for.

    Global step g is step g % steps_per_epoch of epoch g // steps_per_epoch in `batches`, so a loader that starts at
    step g continues another's batches exactly. The next batches are prepared by `threads` threads while the caller
    computes; `wait_s` adds up the seconds that the caller had to wait for them nevertheless.

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
        feeds = _training_feeds(images, batches, start_step)
        graph = {"mean": _checked(mean), "scale": scale, "crop": batches.crop, "views": None}
        self._pipeline = _Pipeline(images, feeds, batches.batch_size, threads, device, **graph)

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


def _training_feeds(images: ShardImages, batches: TrainingBatches, step: int) -> Iterator[tuple[np.ndarray, list]]:
    while True:
        batch = batches.at(*divmod(step, batches.steps_per_epoch))
        yield batch.indices, _one_view_feed(
            images, batch.indices, batch.anchors, batch.flips, batch.shifts, batches.crop
        )
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
        self._batch_size, self._device, self._scale, self._threads = batch_size, device, scale, threads

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        graph = {"mean": self._mean, "scale": self._scale, "crop": CROP, "views": self._views}
        pipeline = _Pipeline(self._images, self._feeds(), self._batch_size, self._threads, self._device, **graph)
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
        for first in range(0, len(self._images), self._batch_size):
            indices = np.arange(first, min(first + self._batch_size, len(self._images)))
            n = len(indices)
            if self._views is not None:
                yield indices, [[self._images.encoded(i) for i in indices]]
            else:
                anchors, flips = CENTRE.anchors.repeat(n, axis=0), CENTRE.flips.repeat(n)
                yield indices, _one_view_feed(self._images, indices, anchors, flips, np.zeros((n, 3)), CROP)


def _checked(mean: np.ndarray) -> np.ndarray:
    if mean.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or mean.dtype != np.float32:
        raise DataError(f"mean image: {mean.dtype} {list(mean.shape)} and not float32 "
                        f"{[IMAGE_SIZE, IMAGE_SIZE, 3]}: preprocess again")
    return mean
