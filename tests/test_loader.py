"""DALI's pixels against Pillow and NumPy, and the order, number and lifetime of batches."""

from __future__ import annotations

import gc
import io
import itertools
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference_pixels import decoded, view

from pipeline.batches import Lighting, TrainingBatches, views_of
from pipeline.errors import DataError
from pipeline.loader import EvaluationLoader, TrainingLoader, _Source
from pipeline.manifest import Manifest, ShardFile, Split, SynsetClass
from pipeline.shards import ShardImages, write_shard
from pipeline.storage import LocalStorage

# Values reach 512 in float32 (a unit in the last place there: 3e-5), rounded two or three times. On the CPU the
# decoders themselves agree bit for bit: both are libjpeg-turbo with its exact inverse DCT and interpolated ("fancy")
# colours.
ROUNDING = 1e-4
IMAGES = 22  # not a multiple of any batch size below
LIGHTING = Lighting.from_covariance(np.diag([5000.0, 3000.0, 2000.0]) + 1000, std=0.1)
MEAN = np.random.default_rng(0).uniform(90, 150, (256, 256, 3)).astype(np.float32)
ZERO_MEAN = np.zeros_like(MEAN)


def made_jpeg(i: int) -> bytes:
    """A picture of coloured blots and noise, stored in one of the ways that a JPEG can be."""
    generator = np.random.default_rng(i)
    blots = Image.fromarray(generator.integers(0, 256, (12, 12, 3), np.uint8)).resize((256, 256), Image.BICUBIC)
    image = Image.fromarray((np.asarray(blots) * 0.8 + generator.integers(0, 50, (256, 256, 3))).astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # an orientation, which nobody may apply: the packer has settled it
    if i % 5 == 4:
        image = image.convert("L")
    stored = [{"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}, {"progressive": True}, {"exif": turned}, {}][i % 5]
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90, **stored)
    return data.getvalue()


def counts_of(images: int) -> list[int]:
    return [1, 0, 0] * images


def shards_of(folder: Path, files: list[ShardFile], images: int, store: str = "jpeg") -> ShardImages:
    splits = {"train": Split(images, 0, counts_of(images), files)}
    manifest = Manifest("class-folders", store, "", 0, 0.0, "", [SynsetClass("n00000000", "blot")], splits,
                        ShardFile("mean.npy", 1, 0, ""), [0.0] * 3, np.eye(3).tolist())
    return ShardImages(folder, manifest, "train")


def packed(folder: Path, stored: list[bytes], store: str = "jpeg") -> ShardImages:
    """Image i has label 3 i and the name image-i."""
    labels, names = [3 * i for i in range(len(stored))], [f"image-{i}" for i in range(len(stored))]
    file = write_shard(LocalStorage(folder), "train-00000.arrow", stored, labels, names)
    return shards_of(folder, [file], len(stored), store)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ShardImages:
    return packed(tmp_path_factory.mktemp("shards"), [made_jpeg(i) for i in range(IMAGES)])


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> ShardImages:
    """The pixels of `images`."""
    return packed(tmp_path_factory.mktemp("raw"), [decoded(made_jpeg(i)).tobytes() for i in range(IMAGES)], "raw")


@pytest.fixture
def batches() -> TrainingBatches:
    return TrainingBatches(IMAGES, batch_size=5, seed=7, lighting=LIGHTING)  # 4 steps an epoch


def take(loader: TrainingLoader, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with loader:
        return list(itertools.islice(loader, n))


def assert_same(ones: list, others: list) -> None:
    assert len(ones) == len(others)
    for (pixels, labels), (other_pixels, other_labels) in zip(ones, others):
        assert torch.equal(labels, other_labels) and torch.equal(pixels, other_pixels)


def assert_is_for_the_network(pixels: torch.Tensor, labels: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert pixels.shape == shape and pixels.dtype == torch.float32
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64 and labels.device == pixels.device


@pytest.mark.parametrize("scale", [1.0, 1 / 64])
def test_training_pixels_are_the_references(images, batches, scale):
    seen = set()
    for step, (pixels, labels) in enumerate(take(TrainingLoader(images, MEAN, batches, scale=scale), 8)):
        batch = batches.at(*divmod(step, 4))
        assert_is_for_the_network(pixels, labels, (5, 3, 224, 224))
        assert labels.tolist() == (3 * batch.indices).tolist()
        for n, i in enumerate(batch.indices):
            expected = view(images.stored(i), MEAN, batch.anchors[n], batch.flips[n], batch.shifts[n], scale)
            np.testing.assert_allclose(pixels[n].numpy(), expected, rtol=0, atol=ROUNDING * scale)
            seen.add((int(i) % 5, bool(batch.flips[n])))
    assert len(seen) == 10  # every way of storing, flipped and not


def test_order_of_mean_shift_and_flip(tmp_path):
    """By hand, without the reference: on a flat image, a mean that rises by 1 a column shows the way of each pixel."""
    data = io.BytesIO()
    Image.new("L", (256, 256), 100).save(data, "JPEG")
    images = packed(tmp_path, [data.getvalue()] * 8)
    mean = np.broadcast_to(np.arange(256, dtype=np.float32)[None, :, None], (256, 256, 3))
    batches = TrainingBatches(8, batch_size=8, seed=1, lighting=LIGHTING)
    ((pixels, _),) = take(TrainingLoader(images, mean, batches, scale=2.0), 1)
    batch, column = batches.at(0, 0), np.arange(224)
    assert 0 < batch.flips.sum() < 8
    for n in range(8):
        mean_there = batch.anchors[n, 1] + (223 - column if batch.flips[n] else column)
        for colour in range(3):
            expected = 2 * (100 - mean_there + batch.shifts[n, colour])
            np.testing.assert_allclose(pixels[n, colour, 50].numpy(), expected, atol=2 * ROUNDING)


def test_the_means_centre_at_every_offset(images):
    """As in the authors' program: the mean's central crop, never mirrored, in training and in every view."""
    batches = TrainingBatches(IMAGES, 5, seed=7, lighting=LIGHTING, mean_at="centre")
    ((pixels, _),) = take(TrainingLoader(images, MEAN, batches), 1)
    batch = batches.at(0, 0)
    assert 0 < batch.flips.sum() < 5
    for n, i in enumerate(batch.indices):
        expected = view(images.stored(i), MEAN, batch.anchors[n], batch.flips[n], batch.shifts[n], mean_at="centre")
        np.testing.assert_allclose(pixels[n].numpy(), expected, rtol=0, atol=ROUNDING)
    pixels, _ = next(iter(EvaluationLoader(images, MEAN, 10, batch_size=2, mean_at="centre")))
    for n, (anchor, flip) in enumerate(zip(*views_of(10)[:2])):
        expected = view(images.stored(1), MEAN, anchor, flip, mean_at="centre")
        np.testing.assert_allclose(pixels[10 + n].numpy(), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("scale", [1.0, 1 / 64])
def test_raw_pixels_make_the_batches_that_their_jpegs_make(images, raw, batches, scale):
    of_jpegs = take(TrainingLoader(images, MEAN, batches, scale=scale, threads=2), 8)
    assert_same(take(TrainingLoader(raw, MEAN, batches, scale=scale, threads=2), 8), of_jpegs)
    for views in (1, 10):
        settings = {"views": views, "batch_size": 8, "scale": scale}
        found = list(EvaluationLoader(raw, MEAN, **settings))
        assert len(found) == 3
        assert_same(found, list(EvaluationLoader(images, MEAN, **settings)))


def test_decoders_agree_to_the_bit(images):
    pixels = torch.cat([pixels for pixels, _ in EvaluationLoader(images, ZERO_MEAN, batch_size=8)])
    for i in range(IMAGES):
        expected = decoded(images.stored(i))[16:240, 16:240]
        np.testing.assert_array_equal(pixels[i].permute(1, 2, 0).numpy(), expected, err_msg=f"image {i}")


@pytest.mark.parametrize(("v", "crop"), [(1, 224), (10, 224), (10, 227)])
def test_evaluation_sees_every_view_of_every_image_once(images, v, crop):
    loader = EvaluationLoader(images, MEAN, v, batch_size=8, scale=0.5, crop=crop)
    found, views = list(loader), views_of(v, crop)
    assert len(loader) == 3 and [len(labels) for _, labels in found] == [8, 8, 6]
    assert torch.cat([labels for _, labels in found]).tolist() == [3 * i for i in range(IMAGES)]
    for pixels, labels in found:
        assert_is_for_the_network(pixels, labels, (len(labels) * v, 3, crop, crop))
    pixels = torch.cat([pixels for pixels, _ in found])
    for i in range(IMAGES):
        for n, (anchor, flip) in enumerate(zip(*views[:2])):
            expected = view(images.stored(i), MEAN, anchor, flip, scale=0.5, crop=crop)
            np.testing.assert_allclose(pixels[i * v + n].numpy(), expected, rtol=0, atol=ROUNDING)


def test_evaluation_starts_afresh_after_a_whole_and_an_abandoned_iteration(images):
    loader = EvaluationLoader(images, MEAN, batch_size=8)
    first = list(loader)
    for _ in loader:
        break
    next(iter(loader))
    interleaved = iter(loader)
    next(interleaved)
    assert_same(list(loader), first)
    assert_same(list(interleaved), first[1:])


def test_a_resumed_stream_is_the_uninterrupted_one(images, batches):
    whole = take(TrainingLoader(images, MEAN, batches), 10)
    for start in (1, 4, 7):  # in the first epoch, at a boundary, in the second epoch
        again = TrainingBatches(IMAGES, batch_size=5, seed=7, lighting=LIGHTING)
        assert_same(take(TrainingLoader(images, MEAN, again, start_step=start), 10 - start), whole[start:])


def test_threads_and_instances_make_no_difference(images, batches):
    expected = take(TrainingLoader(images, MEAN, batches, threads=1), 5)
    assert_same(take(TrainingLoader(images, MEAN, batches, threads=3), 5), expected)
    with TrainingLoader(images, MEAN, batches) as one, TrainingLoader(images, MEAN, batches) as other:
        for (a, _), (b, _), (c, _) in zip(one, other, expected):  # side by side, as two towers have them
            assert torch.equal(a, b) and torch.equal(a, c)


def test_a_batch_that_the_caller_keeps_is_not_overwritten(images, batches):
    with TrainingLoader(images, MEAN, batches) as loader:
        kept, copies = [], []
        for pixels, labels in itertools.islice(loader, 8):
            kept.append((pixels, labels))
            copies.append((pixels.clone(), labels.clone()))
    assert_same(kept, copies)
    del loader
    gc.collect()
    assert_same(kept, copies)


def test_damaged_images_are_named(tmp_path, capfd):
    images = packed(tmp_path, [made_jpeg(i) for i in range(8)])
    shard = tmp_path / "train-00000.arrow"
    raw = shard.read_bytes()
    for i in (5, 6):
        assert raw.count(images.stored(i).tobytes()) == 1
        raw = raw.replace(images.stored(i).tobytes(), bytes(len(images.stored(i))))
    shard.with_name("other").write_bytes(raw)
    os.replace(shard.with_name("other"), shard)  # a new file: `images` still maps the old one
    damaged = shards_of(tmp_path, [ShardFile(shard.name, 8, len(raw), "")], 8)

    found = []
    with pytest.raises(DataError, match=r"^image-5, image-6: .*`alexnet verify`") as caught:
        for batch in EvaluationLoader(damaged, MEAN, batch_size=4):
            found.append(batch)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None
    assert_same(found, list(EvaluationLoader(images, MEAN, batch_size=4))[:1])

    loader = TrainingLoader(damaged, MEAN, TrainingBatches(8, batch_size=8, seed=0, lighting=None))
    with pytest.raises(DataError, match="image-5"):
        next(loader)
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_image_of_another_size_is_named(tmp_path):
    small = io.BytesIO()
    Image.new("RGB", (200, 256)).save(small, "JPEG")
    images = packed(tmp_path, [made_jpeg(0), small.getvalue()])
    for views in (1, 10):
        with pytest.raises(DataError, match="^image-1: "):
            list(EvaluationLoader(images, MEAN, views, batch_size=2))


def test_threads_end_with_the_loader(images, batches):
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def assert_ended() -> None:
        deadline = time.monotonic() + 5  # the kernel forgets a thread a moment after it has been joined
        while threads() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threads() <= before

    gc.collect()  # what earlier tests left, such as the frames of exceptions
    before = threads()
    with TrainingLoader(images, MEAN, batches, threads=3) as loader:
        next(loader)
        assert threads() >= before + 3
    assert_ended()
    loader = TrainingLoader(images, MEAN, batches, threads=3)
    next(loader)
    del loader
    assert_ended()
    for _ in EvaluationLoader(images, MEAN, batch_size=8, threads=3):
        break
    gc.collect()
    assert_ended()


def test_waiting_is_counted(images, batches):
    start = time.perf_counter()
    with TrainingLoader(images, MEAN, batches) as loader:
        assert loader.wait_s == 0
        next(loader)
        assert 0 < loader.source_s < loader.wait_s
        first = loader.wait_s
        next(loader)
        assert 0 < first < loader.wait_s
        time.sleep(0.2)  # not the loader's
        next(loader)
    assert loader.wait_s < time.perf_counter() - start - 0.2


def test_what_does_not_fit_is_refused(images, batches):
    with pytest.raises(DataError, match="mean image: float64"):
        TrainingLoader(images, MEAN.astype(np.float64), batches)
    with pytest.raises(DataError, match=r"mean image: float32 \[3, 256, 256\]"):
        EvaluationLoader(images, MEAN.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="batches of 21 images"):
        TrainingLoader(images, MEAN, TrainingBatches(21, 5, 0, None))
    with pytest.raises(ValueError, match="2 views: 1 or 10"):
        EvaluationLoader(images, MEAN, 2)


def test_no_images_no_batches(tmp_path):
    loader = EvaluationLoader(shards_of(tmp_path, [], 0), MEAN)
    assert len(loader) == 0 and list(loader) == []


@pytest.mark.parametrize("asked", [[0, 0, 1, 1, 2, 2, 0, 1, 2], [2, 2, 2, 1, 0, 0, 1, 0, 1], [0, 1, 2] * 3])
def test_graphs_have_the_batches_in_turn(images, asked):
    """Whichever asks first; what is under way is in the order of the run."""
    plan = TrainingBatches(len(images), 2, 0, None)
    source = _Source(images, iter([plan.at(0, step) for step in range(7)]), slice(None))
    found = {0: [], 1: [], 2: []}
    for graph in asked:
        with suppress(StopIteration):
            stored, batch = source(graph, 3)
            assert [bytes(one) for one in stored] == [bytes(images.stored(i)) for i in batch.indices]
            found[graph].append(batch.indices.tolist())
    expected = [plan.at(0, step).indices.tolist() for step in range(7)]
    assert found == {graph: expected[graph::3] for graph in found}
    assert [batch.indices.tolist() for batch in source.under_way] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["images", "raw"])
def test_gpu_pixels_are_the_cpus(store, batches, request):
    """GPU decoders round the inverse DCT and the colours differently: a few levels in some pixels."""
    images = request.getfixturevalue(store)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_gpu = take(TrainingLoader(images, MEAN, batches, device="cuda", threads=6), 8)
        on_gpu += list(EvaluationLoader(images, MEAN, 10, batch_size=8, device="cuda:0"))
        on_gpu += list(EvaluationLoader(images, MEAN, 1, batch_size=8, device="cuda:0", threads=6))
    stream.synchronize()
    on_cpu = take(TrainingLoader(images, MEAN, batches), 8) + list(EvaluationLoader(images, MEAN, 10, batch_size=8))
    on_cpu += list(EvaluationLoader(images, MEAN, 1, batch_size=8))
    assert len(on_gpu) == len(on_cpu)
    for (pixels, labels), (expected, expected_labels) in zip(on_gpu, on_cpu):
        assert_is_for_the_network(pixels, labels, tuple(expected.shape))
        assert pixels.is_cuda and torch.equal(labels.cpu(), expected_labels)
        difference = (pixels.cpu() - expected).abs()
        assert difference.mean() < 0.5 and (difference > 4).float().mean() < 0.001


@pytest.mark.gpu
def test_gpu_batches_are_safe_from_later_ones(images, batches):
    """Work on a batch is queued behind a long wait, and the batch let go at once, as a training loop does."""
    expected = [pixels.double().mean().item() for pixels, _ in take(TrainingLoader(images, MEAN, batches, "cuda"), 8)]
    sums = []
    with TrainingLoader(images, MEAN, batches, "cuda") as loader:
        for pixels, _ in itertools.islice(loader, 8):
            torch.cuda._sleep(20_000_000)  # about 10 ms of the GPU's time
            sums.append(pixels.double().mean())
            del pixels
    assert [one.item() for one in sums] == expected
