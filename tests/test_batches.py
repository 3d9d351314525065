"""Batches: their distribution, their independence of history, and their very values."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.batches import Batch, Lighting, TrainingBatches, views_of
from pipeline.errors import DataError

# Standard deviations and vectors measured over ImageNet on 0-255 pixels, as published.
PUBLISHED_DEVIATIONS = np.array([121.7801, 37.0939, 19.7208])
PUBLISHED_VECTORS = np.array(
    [[-0.56351, -0.57618, -0.59200], [-0.71258, -0.02354, 0.70120], [0.41796, -0.81698, 0.39731]]
)
COVARIANCE = PUBLISHED_VECTORS.T @ np.diag(PUBLISHED_DEVIATIONS**2) @ PUBLISHED_VECTORS


def assert_same(one: Batch, other: Batch) -> None:
    for field in ("indices", "anchors", "flips", "shifts", "mean_anchors", "mean_flips"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)


def test_lighting_by_deviation_is_of_pixels_in_0_255():
    lighting = Lighting.from_covariance(COVARIANCE, std=0.1, by="deviation")
    np.testing.assert_allclose(lighting.scales, 0.1 * PUBLISHED_DEVIATIONS, rtol=1e-4)


def test_lighting_has_the_scale_of_published_eigenvalues():
    lighting = Lighting.from_covariance(COVARIANCE, std=0.1)
    # 0-1 pixels: lambda = (121.78 / 255)**2 = 0.228, and so on; 255 times 0.1 of it on 0-255 pixels.
    np.testing.assert_allclose(lighting.scales, [5.816, 0.5396, 0.15251], rtol=1e-3)
    # The published vectors are in rows, each with a negative greatest entry, which is made positive here.
    np.testing.assert_allclose(lighting.components, -PUBLISHED_VECTORS.T, atol=1e-4)


def test_lighting_does_not_depend_on_the_sign_of_eigenvectors(monkeypatch):
    expected = Lighting.from_covariance(COVARIANCE)
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda m: (eigh(m)[0], eigh(m)[1] * [-1, 1, -1]))
    np.testing.assert_array_equal(Lighting.from_covariance(COVARIANCE).components, expected.components)


def test_shifts_have_the_covariance_that_the_formula_gives():
    lighting = Lighting.from_covariance(COVARIANCE, std=0.1)
    shifts = lighting.shifts(200_000, np.random.default_rng(1)).astype(np.float64)
    # cov(sum_i p_i alpha_i lambda_i) = 0.01 * sum_i lambda_i^2 p_i p_i^T, and sum_i lambda_i^2 p_i p_i^T = C @ C.
    unit = COVARIANCE / 255**2
    np.testing.assert_allclose(np.cov(shifts.T), 255**2 * 0.01 * unit @ unit, rtol=0.02, atol=0.05)
    assert np.abs(shifts.mean(0)).max() < 0.03


def test_no_noise_and_grey_noise():
    assert not Lighting.from_covariance(COVARIANCE, std=0).shifts(5, np.random.default_rng(1)).any()
    grey = Lighting.from_covariance(np.full((3, 3), 900.0)).shifts(5, np.random.default_rng(1))
    np.testing.assert_allclose(grey - grey[:, :1], 0, atol=1e-5)  # R = G = B
    assert grey.any()


@pytest.mark.parametrize("matrix", [np.eye(2), np.full((3, 3), np.nan), np.triu(np.ones((3, 3)))])
def test_lighting_refuses_what_is_no_covariance(matrix):
    with pytest.raises(DataError, match="rgb_covariance"):
        Lighting.from_covariance(matrix)


def test_an_epoch_is_a_permutation_and_drops_the_partial_batch():
    batches = TrainingBatches(images=103, batch_size=10, seed=3, lighting=None)
    assert batches.steps_per_epoch == 10
    epochs = [np.concatenate([batches.at(e, s).indices for s in range(10)]) for e in range(2)]
    for indices in epochs:
        assert indices.dtype == np.int64 and len(set(indices.tolist())) == 100
        assert 0 <= indices.min() and indices.max() <= 102
    assert (epochs[0] != epochs[1]).mean() > 0.9
    assert (np.diff(epochs[0]) != 1).mean() > 0.9  # not the stored order


def test_a_batch_does_not_depend_on_what_was_asked_before():
    lighting = Lighting.from_covariance(COVARIANCE)
    one, other = (TrainingBatches(images=64, batch_size=8, seed=5, lighting=lighting) for _ in range(2))
    forwards = {(e, s): one.at(e, s) for e in range(3) for s in range(8)}
    for e, s in reversed(forwards):
        assert_same(forwards[e, s], other.at(e, s))


def test_seed_epoch_and_step_all_matter():
    lighting = Lighting.from_covariance(COVARIANCE)
    a = TrainingBatches(640, 64, seed=0, lighting=lighting)
    b = TrainingBatches(640, 64, seed=1, lighting=lighting)
    first = a.at(0, 0)
    for other in (a.at(0, 1), a.at(1, 0), b.at(0, 0)):
        assert (first.indices != other.indices).mean() > 0.9
        assert (first.anchors != other.anchors).mean() > 0.9
        assert 0.2 < (first.flips != other.flips).mean() < 0.8
        assert (first.shifts != other.shifts).all()


def test_every_offset_and_both_flips_are_equally_likely():
    batches = TrainingBatches(images=20_000, batch_size=20_000, seed=9, lighting=None)
    drawn = [batches.at(epoch, 0) for epoch in range(5)]
    counts = np.zeros((33, 33))
    for batch in drawn:
        np.add.at(counts, tuple(batch.anchors.T), 1)
    expected = counts.sum() / counts.size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    # 1088 degrees of freedom: mean 1088, standard deviation 46.6. An offset left out would add 92 to it.
    assert counts.min() > 0 and abs(chi_squared - 1088) < 5 * 46.6
    assert abs(np.mean([batch.flips.mean() for batch in drawn]) - 0.5) < 5 * 0.5 / np.sqrt(100_000)


def test_lighting_changes_nothing_but_the_shifts():
    plain = TrainingBatches(32, 8, seed=2, lighting=None).at(4, 1)
    lit = TrainingBatches(32, 8, seed=2, lighting=Lighting.from_covariance(COVARIANCE)).at(4, 1)
    assert not plain.shifts.any() and lit.shifts.all()
    for field in ("indices", "anchors", "flips"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(lit, field))


def test_lighting_ends_after_its_epochs():
    lighting = Lighting.from_covariance(COVARIANCE)
    whole, ended = (TrainingBatches(32, 8, 2, lighting, epochs) for epochs in (None, 3))
    assert_same(whole.at(2, 3), ended.at(2, 3))
    assert whole.at(3, 0).shifts.all() and not ended.at(3, 0).shifts.any()
    np.testing.assert_array_equal(whole.at(3, 0).anchors, ended.at(3, 0).anchors)


@pytest.mark.parametrize("batch_size, runs", [(128, [32] * 4), (80, [32, 32, 16])])
def test_crops_shared_by_images_next_to_each_other(batch_size, runs):
    batches = TrainingBatches(500, batch_size, 4, Lighting.from_covariance(COVARIANCE), crops_shared_by=32)
    seen = set()
    for step in range(batches.steps_per_epoch):
        batch, first = batches.at(0, step), 0
        for run in runs:
            crops = {(*anchor, flip) for anchor, flip in zip(batch.anchors[first : first + run].tolist(),
                                                             batch.flips[first : first + run].tolist())}
            assert len(crops) == 1
            seen |= crops
            first += run
        assert first == batch_size == len(set(map(tuple, batch.shifts.tolist())))  # each image has its own noise
    assert len(seen) > batches.steps_per_epoch


def test_golden_values():
    """A run that is resumed under another NumPy, or after a change here, must go on with these batches."""
    lighting = Lighting(np.eye(3)[[2, 0, 1]].T, np.array([1.0, 10.0, 100.0]))
    batch = TrainingBatches(images=1000, batch_size=4, seed=2012, lighting=lighting).at(epoch=7, step=100)
    assert batch.indices.tolist() == [563, 935, 532, 638]
    assert batch.anchors.tolist() == [[1, 15], [24, 23], [10, 14], [7, 12]]
    assert batch.flips.tolist() == [True, False, True, True]
    shifts = [
        [-11.5018015, 0.0541130975, -0.765250504],
        [-10.2013330, 3.75747466, -0.349363595],
        [16.8250427, -16.7851639, 0.526190877],
        [6.74161386, -84.2734680, -0.711408615],
    ]
    np.testing.assert_allclose(batch.shifts, shifts, rtol=1e-6)


def test_too_few_images_is_the_users_error():
    with pytest.raises(DataError, match="has 100 images, one batch needs 128"):
        TrainingBatches(images=100, batch_size=128, seed=0, lighting=None)
    assert TrainingBatches(images=128, batch_size=128, seed=0, lighting=None).steps_per_epoch == 1


@pytest.mark.parametrize(("epoch", "step"), [(0, 10), (0, -1), (-1, 0)])
def test_a_step_outside_the_epoch_is_refused(epoch, step):
    with pytest.raises(ValueError, match="an epoch has 10 steps"):
        TrainingBatches(images=100, batch_size=10, seed=0, lighting=None).at(epoch, step)


def test_views():
    centre, ten = views_of(1), views_of(10)
    assert centre.anchors.tolist() == [[16, 16]] and centre.flips.tolist() == [False]
    five = [[0, 0], [0, 32], [32, 0], [32, 32], [16, 16]]
    assert ten.anchors.tolist() == five + five
    assert ten.flips.tolist() == [False] * 5 + [True] * 5
    with pytest.raises(ValueError, match="5 views: 1 or 10"):
        views_of(5)


def test_views_of_other_crops_than_the_papers():
    """Caffe's are of 227 pixels: 29 to spare, of which it leaves 14 before the central one."""
    five = [[0, 0], [0, 29], [29, 0], [29, 29], [14, 14]]
    assert views_of(10, 227).anchors.tolist() == five + five
    assert views_of(1, 227).of(np.arange(2), "centre").mean_anchors.tolist() == [[14, 14]] * 2
    batches = TrainingBatches(4000, 4000, seed=1, lighting=None, mean_at="centre", crop=227).at(0, 0)
    assert (batches.anchors.min(), batches.anchors.max()) == (0, 29) and set(batches.mean_anchors.flat) == {14}


def test_without_crops_and_flips_the_rest_is_the_same():
    lighting = Lighting.from_covariance(COVARIANCE)
    whole, still = (TrainingBatches(32, 8, 2, lighting, crops_and_flips=moved).at(1, 2) for moved in (True, False))
    assert set(still.anchors.flat) == {16} and not still.flips.any()
    assert len(set(whole.anchors.flat)) > 3 and whole.flips.any()
    np.testing.assert_array_equal(whole.indices, still.indices)
    np.testing.assert_array_equal(whole.shifts, still.shifts)
