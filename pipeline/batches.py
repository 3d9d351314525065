"""Batches as pure functions: which images, and what is done to each.

(seed, epoch, step) gives everything, so a run can be resumed in mid-epoch, the processes of one run agree without
talking, and any step can be looked at again. NumPy only; pixels are in pipeline.loader.

Shapes: N images of a batch, V views of one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.errors import DataError
from pipeline.manifest import IMAGE_SIZE

CROP = 224  # pixels, both sides of what the network sees


class Views(NamedTuple):
    """The crops of one image that an evaluation looks at."""

    anchors: np.ndarray  # int32 [V, 2], (y, x) of the top left pixel
    flips: np.ndarray  # bool [V], mirrored left to right
    crop: int  # pixels, both ways

    def of(self, indices: np.ndarray, mean_at: str) -> Batch:
        """Return the batch of these views of each image of `indices`."""
        images, crops = len(indices), len(indices) * len(self.flips)
        return placed(indices, np.tile(self.anchors, (images, 1)), np.tile(self.flips, images),
                      np.zeros((crops, 3), np.float32), mean_at, self.crop)


def views_of(count: int, crop: int = CROP) -> Views:
    """Return the centre (`count` 1), or the paper's ten views (section 4.1): four corners and the centre, then the same
    five mirrored."""
    edge, middle = IMAGE_SIZE - crop, (IMAGE_SIZE - crop) // 2
    if count == 1:
        return Views(np.array([[middle, middle]], np.int32), np.array([False]), crop)
    if count != 10:
        raise ValueError(f"{count} views: 1 or 10")
    five = [[0, 0], [0, edge], [edge, 0], [edge, edge], [middle, middle]]
    return Views(np.array(five * 2, np.int32), np.repeat([False, True], 5), crop)


@dataclass(frozen=True, eq=False)
class Lighting:
    """The paper's colour noise (section 4.1): one RGB vector added to all pixels of an image.

    The shift of an image is components @ (scales * a), a drawn anew for each image from N(0, 1) three times.
    """

    components: np.ndarray  # float64 [3, 3], column i is the unit eigenvector p_i in RGB
    scales: np.ndarray  # float64 [3], standard deviation along p_i, in levels of 0-255 pixels

    @classmethod
    def from_covariance(cls, rgb_covariance: np.ndarray, std: float = 0.1, by: str = "variance") -> Lighting:
        """Make it from the covariance [3, 3] of RGB pixels in 0-255, with alpha_i ~ N(0, std).

        The paper writes sum_i p_i alpha_i lambda_i and no unit. As its reproductions do, lambda_i is taken of pixels
        scaled to 0-1, and so is the shift: lambda_i = eigenvalue / 255**2, and the shift of 0-255 pixels is 255 times
        that. By "deviation", as the authors' program has it, lambda_i is the square root of the eigenvalue, the
        standard deviation of 0-255 pixels along p_i. Raises DataError for what is no covariance.
        """
        covariance = np.asarray(rgb_covariance, np.float64)
        if covariance.shape != (3, 3) or not np.isfinite(covariance).all() or not np.allclose(covariance, covariance.T):
            raise DataError("rgb_covariance is not a finite symmetric 3 x 3 matrix: preprocess again")
        eigenvalues, components = np.linalg.eigh(covariance)
        eigenvalues, components = eigenvalues[::-1].clip(min=0), components[:, ::-1]  # greatest first
        # p and -p are both eigenvectors, and which one LAPACK returns is its affair: make the greatest entry positive,
        # the first of equals, so that a resumed run has the same noise on another machine.
        greatest = np.argmax(np.abs(components).round(6), axis=0)
        components = components * np.sign(components[greatest, range(3)])
        return cls(components, std * (np.sqrt(eigenvalues) if by == "deviation" else eigenvalues / 255))

    def shifts(self, images: int, generator: np.random.Generator) -> np.ndarray:
        """Draw float32 [images, 3], to be added to RGB pixels in 0-255."""
        return ((generator.standard_normal((images, 3)) * self.scales) @ self.components.T).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step looks at: one crop of each image in training, V in evaluation, next to each other."""

    indices: np.ndarray  # int64 [N], positions in the split's stored order
    anchors: np.ndarray  # int32 [N * V, 2], (y, x) of the crop's top left pixel
    flips: np.ndarray  # bool [N * V], mirrored left to right
    shifts: np.ndarray  # float32 [N * V, 3], added to RGB pixels in 0-255
    mean_anchors: np.ndarray  # int32 [N * V, 2], where in the mean image the crop's mean begins
    mean_flips: np.ndarray  # bool [N * V], that mean mirrored


def placed(
    indices: np.ndarray, anchors: np.ndarray, flips: np.ndarray, shifts: np.ndarray, mean_at: str, crop: int = CROP
) -> Batch:
    """Return a batch that subtracts the mean at each crop's place, flipped with it ("crop"), or always the mean's
    central crop, never flipped ("centre")."""
    if mean_at == "crop":
        return Batch(indices, anchors, flips, shifts, anchors, flips)
    centre = np.full((len(flips), 2), (IMAGE_SIZE - crop) // 2, np.int32)
    return Batch(indices, anchors, flips, shifts, centre, np.zeros_like(flips))


# The first word of the key of each random stream. Without it, NumPy would give [seed, epoch] and [seed, epoch, 0] the
# same stream.
_ORDER, _AUGMENTATION = 0, 1


class TrainingBatches:
    """The batches of a training run over `images` images; the last partial batch of an epoch is dropped.

    Each epoch is a permutation of all images. Crops are uniform over all offsets, flips have p = 0.5, both drawn once
    for `crops_shared_by` images next to each other; without `crops_and_flips` each image's centre is seen. Lighting
    (none: no shift) is drawn for every image, in the first `lighting_epochs` epochs (none: in all). `mean_at` as in
    `placed`.

    Raises DataError where there are fewer images than one batch needs.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        lighting: Lighting | None,
        lighting_epochs: int | None = None,
        crops_and_flips: bool = True,
        crops_shared_by: int = 1,
        mean_at: str = "crop",
        crop: int = CROP,
        image_size: int = IMAGE_SIZE,
    ):
        if not 0 < crop <= image_size or batch_size < 1:
            raise ValueError(f"crop {crop} of {image_size} pixels, batch of {batch_size}")
        if images < batch_size:
            raise DataError(f"the training set has {images} images, one batch needs {batch_size}: "
                            "choose a smaller batch or more images")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.lighting, self.lighting_epochs = lighting, lighting_epochs
        self.crops_and_flips, self.crops_shared_by, self.mean_at = crops_and_flips, crops_shared_by, mean_at
        self.crop, self.image_size = crop, image_size
        self.steps_per_epoch = images // batch_size
        self._order_of: tuple[int, np.ndarray] | None = None  # only to save time: the last epoch asked for

    def at(self, epoch: int, step: int) -> Batch:
        """Return the batch of `step` (from 0) in `epoch` (from 0): the same for the same seed, whatever came before."""
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"epoch {epoch}, step {step}: an epoch has {self.steps_per_epoch} steps")
        n = self.batch_size
        generator = self._generator(_AUGMENTATION, epoch, step)
        # The colour noise is drawn last, so that a run without it has the same crops and flips.
        draws = -(-n // self.crops_shared_by)
        anchors = generator.integers(0, self.image_size - self.crop, (draws, 2), np.int32, endpoint=True)
        flips = generator.integers(0, 2, draws, np.int32) == 1
        if self.has_lighting(epoch):
            shifts = self.lighting.shifts(n, generator)
        else:
            shifts = np.zeros((n, 3), np.float32)
        if not self.crops_and_flips:
            anchors[:], flips[:] = (self.image_size - self.crop) // 2, False
        if draws < n:
            anchors, flips = (drawn.repeat(self.crops_shared_by, axis=0)[:n] for drawn in (anchors, flips))
        return placed(self._order(epoch)[step * n : (step + 1) * n], anchors, flips, shifts, self.mean_at, self.crop)

    def has_lighting(self, epoch: int) -> bool:
        return self.lighting is not None and (self.lighting_epochs is None or epoch < self.lighting_epochs)

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            order = self._generator(_ORDER, epoch).permutation(self.images)
            order.flags.writeable = False  # batches are views of it
            self._order_of = epoch, order
        return self._order_of[1]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=key)))
