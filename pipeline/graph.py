"""The DALI graph that makes pixels of stored images, and what each batch feeds to it.

What is done to an image, in this order (recipes `notes` and `paper`): decode, cut the crop, subtract the mean image's
part at the crop's own offset, add the colour shift, flip, multiply by `scale`. DALI draws nothing at random.

The operators come in another order, with the same result: what can be done to bytes is done before they become
floats, which are four times as large. The GPU has one kernel that flips, makes floats and adds the shift; on the CPU
that kernel is slower than `flip` and `normalize` one after the other.

Shapes: N images of a batch, V views of one image.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

# DALI keeps large host buffers for the next batch and gives smaller ones back to the system, which clears them when
# they are asked for again, batch after batch. Its limit, 32 MB, lies above a batch of cropped bytes. Read once, when
# DALI first allocates.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")

from nvidia.dali import fn, pipeline_def, types  # noqa: E402

from pipeline.batches import Views  # noqa: E402
from pipeline.manifest import IMAGE_SIZE  # noqa: E402

PREFETCHED_BATCHES = 2


@pipeline_def(prefetch_queue_depth=PREFETCHED_BATCHES)
def graph(source: Callable, mean: np.ndarray, scale: float, crop: int, views: Views | None, store: str, on_gpu: bool):
    """Float pixels [crop, crop, 3], or [V, crop, crop, 3] where `views` has several, of what `source` feeds."""
    # The CPU decoder interpolates colours, as Pillow does, bit for bit; fancy upsampling makes GPU decoders interpolate
    # too. The packer has settled every image's orientation. The share of the JPEG engine is DALI 2.4's default, pinned
    # since it has changed between releases.
    decode = {"output_type": types.RGB, "jpeg_fancy_upsampling": True, "adjust_orientation": False}
    decode |= {"device": "mixed", "hw_decoder_load": 0.65} if on_gpu else {"device": "cpu"}
    device = "gpu" if on_gpu else "cpu"
    window = {"shape": [crop, crop], "axes": [0, 1]}
    stored = (types.UINT8, 3, "HWC") if store == "raw" else (types.UINT8, 1, "")

    if views is not None:
        (image,) = _fed(source, stored)
        if store == "jpeg":
            image = fn.decoders.image(image, **decode)
        elif on_gpu:
            image = image.gpu()
        crops = [fn.slice(image, start=anchor.tolist(), **window) for anchor in views.anchors]
        pixels = fn.stack(*(fn.flip(one, horizontal=int(flip)) for one, flip in zip(crops, views.flips)))
        mean_views = MeanCrops(mean * np.float32(scale), crop).at(*views)
        return pixels * scale - types.Constant(np.stack(mean_views), device=device)

    anchors, flips = (types.INT32, 1, ""), (types.INT32, 0, "")
    if on_gpu:
        image, anchor, flip, shift, mean_anchor = _fed(source, stored, anchors, flips, (types.FLOAT, 1, ""), anchors)
    else:
        image, anchor, flip, shift, mean_crop = _fed(
            source, stored, anchors, flips, (types.FLOAT, 2, ""), (types.FLOAT, 3, "")
        )
    if store == "jpeg":
        pixels = fn.decoders.image_slice(image, start=anchor, **window, **decode)
    else:
        pixels = fn.slice(image, start=anchor, **window)  # on the CPU in any case: a GPU is sent the crop alone
    if on_gpu:
        # Flip, make floats, add the shift and scale: (pixels - -shift) * scale.
        pixels = fn.crop_mirror_normalize(
            pixels.gpu(), mirror=flip, mean=-shift, scale=scale, dtype=types.FLOAT, output_layout="HWC"
        )
        # The crop of the mean that belongs to a flipped image is cut from the mean's mirror image, which stands beside.
        mean_and_mirror = np.concatenate([mean, mean[:, ::-1]], axis=1) * np.float32(scale)
        return pixels - fn.slice(types.Constant(mean_and_mirror, device=device), start=mean_anchor, **window)
    # A row of pixels is one axis here, as the shift of a row is: `normalize` subtracts long rows fast, triples slowly.
    rows = fn.reshape(fn.flip(pixels, horizontal=flip), shape=[crop, 3 * crop])
    rows = fn.normalize(rows, axes=[0], mean=-shift, stddev=1.0, scale=scale)
    return fn.reshape(rows, shape=[crop, crop, 3]) - mean_crop


def _fed(source: Callable, *inputs: tuple) -> list:
    """The inputs of the graph, each (type, dimensions of a sample, layout)."""
    dtype, ndim, layout = (list(column) for column in zip(*inputs))
    # no_copy: stored images are read where the shard is mapped, crops of the mean where they lie. DALI refers to the
    # arrays until it is done with them.
    return fn.external_source(
        source, num_outputs=len(inputs), batch=True, no_copy=True, dtype=dtype, ndim=ndim, layout=layout
    )


class MeanCrops:
    """Every crop of the mean image, mirrored or not, as a view that is contiguous, so that DALI can read it in place.

    45 MB for crops of 224 pixels: a copy of the mean for each horizontal offset. Copying the crop of each image instead
    takes a sixth of the CPU's time for the whole graph.
    """

    def __init__(self, mean: np.ndarray, crop: int):
        """`mean` is float32 [256, 256, 3]."""
        windows = [mean[:, x : x + crop] for x in range(IMAGE_SIZE - crop + 1)]
        self._columns = np.stack([np.stack(windows), np.stack([window[:, ::-1] for window in windows])])
        self._crop = crop

    def at(self, anchors: np.ndarray, flips: np.ndarray) -> list[np.ndarray]:
        """Return a view [crop, crop, 3] for each of `anchors` [N, 2], (y, x), and `flips` [N]."""
        where = zip(flips.astype(int).tolist(), anchors.tolist())
        return [self._columns[flip, x, y : y + self._crop] for flip, (y, x) in where]


class OneViewFeed:
    """What a graph with one view is fed for a batch."""

    def __init__(self, mean: np.ndarray, scale: float, crop: int, on_gpu: bool):
        self._crop = crop
        self._mean_crops = None if on_gpu else MeanCrops(mean * np.float32(scale), crop)

    def of(self, stored: list[np.ndarray], anchors: np.ndarray, flips: np.ndarray, shifts: np.ndarray) -> list:
        """`anchors` int [N, 2], `flips` bool [N], `shifts` float [N, 3], in levels of 0-255."""
        anchors, flags, shifts = anchors.astype(np.int32), flips.astype(np.int32), shifts.astype(np.float32)
        if self._mean_crops is not None:
            rows = np.tile(shifts, (1, self._crop))[:, None]
            return [stored, anchors, flags, rows, self._mean_crops.at(anchors, flips)]
        mirrored_x = 2 * IMAGE_SIZE - self._crop - anchors[:, 1]
        mean_x = np.where(flips, mirrored_x, anchors[:, 1])
        return [stored, anchors, flags, shifts, np.stack([anchors[:, 0], mean_x], axis=1)]
