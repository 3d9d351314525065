"""What the loader is measured against: endless iterators over batches of the same images.

`dataloader` does all that the loader does; `ffcv` less (a mean per channel, no colour shift, always the central crop);
`dali_decode` no more than its name says.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from pipeline.batches import CROP, TrainingBatches
from pipeline.manifest import IMAGE_SIZE, load_manifest
from pipeline.shards import ShardImages


class _PillowImages(Dataset):
    """Training images as one would make them with Pillow and NumPy: float32 [224, 224, 3]."""

    def __init__(self, shards: Path, mean: np.ndarray, plan: TrainingBatches):
        self._shards, self._mean, self._plan = shards, mean, plan
        self._images: ShardImages | None = None  # opened in the worker

    def __len__(self) -> int:
        return self._plan.images

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._images is None:
            self._images = ShardImages(self._shards, load_manifest(self._shards)[0], "train")
            self._generator = np.random.default_rng()
        image = self._images.stored(index)
        if self._images.store == "jpeg":
            image = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        y, x = self._generator.integers(0, IMAGE_SIZE - CROP, 2, endpoint=True)
        pixels = image[y : y + CROP, x : x + CROP] - self._mean[y : y + CROP, x : x + CROP]
        pixels += self._plan.lighting.shifts(1, self._generator)
        if self._generator.random() < 0.5:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        return torch.from_numpy(pixels), int(self._images.labels[index])


@contextmanager
def dataloader(shards: Path, mean: np.ndarray, plan: TrainingBatches, workers: int) -> Iterator[Iterator]:
    """torch's DataLoader with Pillow."""
    images = _PillowImages(shards, mean, plan)
    endless = RandomSampler(images, replacement=True, num_samples=2**62)
    # Started anew and not forked: a fork would take over locks that DALI's threads may hold.
    yield iter(DataLoader(images, plan.batch_size, sampler=endless, num_workers=workers,
                          multiprocessing_context="spawn"))


def dali_decode(
    images: ShardImages, plan: TrainingBatches, threads: int, device: torch.device, crop: bool
) -> Iterator:
    """DALI's decoder alone: whole images or random crops of 224 x 224 pixels, as bytes."""
    on_gpu = device.type == "cuda"
    decode = {"output_type": types.RGB, "jpeg_fancy_upsampling": True, "adjust_orientation": False}
    decode |= {"device": "mixed", "hw_decoder_load": 0.65} if on_gpu else {"device": "cpu"}

    def source():
        for step in range(2**62):
            batch = plan.at(*divmod(step, plan.steps_per_epoch))
            yield [images.stored_batch(batch.indices), batch.anchors][: 1 + crop]

    @pipeline_def(batch_size=plan.batch_size, num_threads=threads, device_id=device.index or 0 if on_gpu else None)
    def pipeline():
        settings = {"batch": True, "no_copy": True, "num_outputs": 1 + crop}
        jpeg, *anchor = fn.external_source(
            source(), dtype=[types.UINT8, types.INT32][: 1 + crop], ndim=1, **settings
        )
        if crop:
            return fn.decoders.image_slice(jpeg, start=anchor[0], shape=[CROP, CROP], axes=[0, 1], **decode)
        return fn.decoders.image(jpeg, **decode)

    decoder = pipeline()
    while True:
        (output,) = decoder.run()
        yield torch.from_dlpack(output.as_tensor())


@contextmanager
def ffcv(images: ShardImages, rgb_mean: list[float], batch: int, threads: int, epoch: int) -> Iterator[Iterator]:
    """FFCV, on the CPU, over a file of its own: the same pictures, again and again for an epoch of `epoch` batches.

    It starts threads and allocates memory anew for every epoch, which is not what is to be measured.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    class Pixels(Dataset):
        def __len__(self) -> int:
            return batch * epoch

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            index %= len(images)
            stored = images.stored(index)
            if images.store == "jpeg":
                stored = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
            return stored, int(images.labels[index])

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "train.beton"))
        mode = "jpg" if images.store == "jpeg" else "raw"
        fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=90), "label": IntField()}
        DatasetWriter(path, fields, num_workers=threads).from_indexed_dataset(Pixels())
        transforms = [CenterCropRGBImageDecoder((CROP, CROP), ratio=CROP / IMAGE_SIZE), RandomHorizontalFlip(),
                      NormalizeImage(np.array(rgb_mean), np.ones(3), np.float32), ToTensor(), ToTorchImage()]
        loader = Loader(path, batch_size=batch, num_workers=threads, order=OrderOption.RANDOM, os_cache=True,
                        drop_last=True, pipelines={"image": transforms, "label": [IntDecoder(), ToTensor()]})

        def endless():
            while True:
                yield from loader

        iterator = endless()
        yield iterator
        iterator.close()
