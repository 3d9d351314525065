"""The pass over the bytes on the CPU against NumPy, to the bit, and what becomes of its memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.batches import Batch, placed, views_of
from pipeline.compiled import compiled
from pipeline.pixels.finish import Finisher

GENERATOR = np.random.default_rng(0)
MEAN = GENERATOR.uniform(0, 255, (256, 256, 3)).astype(np.float32)
IMAGES = GENERATOR.integers(0, 256, (4, 256, 256, 3), np.uint8)


def batch_of(anchors: np.ndarray, flips: np.ndarray, mean_at: str = "crop") -> Batch:
    shifts = GENERATOR.normal(0, 20, (len(flips), 3)).astype(np.float32)
    return placed(np.arange(len(IMAGES)), anchors, flips, shifts, mean_at)


def expected(batch: Batch, scale: float, crop: int) -> np.ndarray:
    """The same float32 operations in the same order."""
    crops, each = [], len(batch.flips) // len(IMAGES)
    for k, (y, x) in enumerate(batch.anchors):
        image = IMAGES[k // each][y : y + crop, x : x + crop].astype(np.float32)
        mean_y, mean_x = batch.mean_anchors[k]
        mean = MEAN[mean_y : mean_y + crop, mean_x : mean_x + crop]
        image, mean = image[:, ::-1] if batch.flips[k] else image, mean[:, ::-1] if batch.mean_flips[k] else mean
        crops.append((image - mean + batch.shifts[k]) * np.float32(scale))
    return np.stack(crops)


RANDOM = batch_of(GENERATOR.integers(0, 33, (4, 2), np.int32), np.array([True, False, True, False]))
CORNERS = batch_of(np.array([[0, 0], [0, 32], [32, 0], [32, 32]], np.int32), np.array([True, True, False, False]))
TEN = batch_of(np.tile(views_of(10).anchors, (4, 1)), np.tile(views_of(10).flips, 4))
CENTRED = batch_of(RANDOM.anchors, RANDOM.flips, mean_at="centre")


@pytest.mark.parametrize("batch", [RANDOM, CORNERS, TEN, CENTRED], ids=["random", "corners", "ten views", "centred"])
@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("scale", [1.0, 1 / 57])
def test_crops_of_whole_images_are_numpys_to_the_bit(batch, threads, scale):
    found = Finisher(MEAN, scale, 224, threads).finish(IMAGES, batch)
    np.testing.assert_array_equal(found.numpy(), expected(batch, scale, 224))


@pytest.mark.parametrize("crop", [1, 7, 224, 256])
def test_crops_that_are_cut_already_are_numpys_to_the_bit(crop):
    anchors = GENERATOR.integers(0, 257 - crop, (4, 2)).astype(np.int32)
    batch = batch_of(anchors, np.array([False, True, True, False]))
    cut = np.stack([image[y : y + crop, x : x + crop] for image, (y, x) in zip(IMAGES, anchors)])
    found = Finisher(MEAN, 0.5, crop, 2).finish(cut, batch)
    np.testing.assert_array_equal(found.numpy(), expected(batch, 0.5, crop))


def test_memory_is_used_again_once_no_tensor_refers_to_it():
    finisher = Finisher(MEAN, 1.0, 224, 2)
    one = finisher.finish(IMAGES, RANDOM)
    part = one.permute(0, 3, 1, 2)[2:]
    place, pixels = one.data_ptr(), part.clone()
    del one
    other = finisher.finish(IMAGES, CORNERS)
    assert other.data_ptr() != place and torch.equal(part, pixels)  # a view of the first batch is left
    del part
    again = finisher.finish(IMAGES, RANDOM)
    assert again.data_ptr() == place
    np.testing.assert_array_equal(again.numpy(), expected(RANDOM, 1.0, 224))
    del again
    assert finisher.finish(IMAGES[:2], batch_of(RANDOM.anchors[:2], RANDOM.flips[:2])).data_ptr() == place
    assert finisher.finish(IMAGES, TEN).shape == (40, 224, 224, 3)  # more than what is free


def test_functions_whose_code_cannot_be_kept_are_compiled_all_the_same():
    assert compiled(eval("lambda x: x + 1"))(2) == 3  # there is no file, so there is no place beside it
