"""What TensorBoard reads is what the log says, after kills and resumes too; and no board stops a training."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from launch.board import GAP, GROUPS, Board, crop_grid, kernel_grid
from launch.runlog import RunLog, of_the_run, read_log
from model.recipe import TINY, meanings
from pipeline.batches import Lighting, TrainingBatches
from pipeline.pixels.finish import Finisher


class Run:
    """One process's log and board, as a training has them."""

    def __init__(self, path: Path):
        self.log, self.board = RunLog(path / "log.jsonl"), Board(path)

    def write(self, event: str, **fields) -> None:
        self.log.write(event, **fields)
        self.board.record(event, fields)

    def begin(self, event: str, step: int, **fields) -> None:
        self.write(event, command="alexnet train a|b run", commit=None, versions={"torch": "2"}, step=step,
                   steps_per_epoch=30, recipe=TINY.to_dict(), wnids=["n01"] * 1000, **fields)

    def train(self, first: int, last: int) -> None:
        """Steps with made-up figures; an epoch has 30, after which there is a checkpoint and then a validation."""
        random = np.random.default_rng(first)
        for step in range(first, last + 1, 10):
            loss, rate, images = random.random(3)
            self.write("steps", step=step, epoch=step / 30, rate=rate, loss=loss, train_top1_error=0.5, memory_gib=1.5,
                       images_per_s=1000 * images, waiting_for_data=0.25, waiting_for_peer=0.0)
            if step % 30 == 0:
                self.write("checkpoint", step=step, path="checkpoints/x", held_s=0.1, seconds=random.random())
                self.write("epoch", epoch=step // 30, step=step, validation_s=2.0, trained_s=float(step),
                           val={"top1": random.random(), "top5": 0.25, "images": 50})

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self.log.__exit__()
        self.board.close()


def seen(run: Path) -> EventAccumulator:
    read = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    return read.Reload()


def scalars(read: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of the log, whose numbers are written down as float32."""
    records, found = read_log(run / "log.jsonl"), {}
    for event, group in GROUPS.items():
        for record in of_the_run(records, event):
            for name, value in {**record, **record.get("val", {})}.items():
                if name not in ("event", "time", "step", "epoch", "val", "path"):
                    found.setdefault(f"{group}/{name}", []).append((record["step"], float(np.float32(value))))
    return found


def by_order(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars to a reader that goes by the order of steps, as TensorBoard's own server does: a point makes those of
    its name forgotten that have its step or a later one."""
    found = {}
    for path in sorted((run / "tensorboard").iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    kept = [point for point in found.get(value.tag, []) if point[0] < event.step]
                    found[value.tag] = [*kept, (event.step, value.simple_value)]
    return found


def test_scalars_are_the_logs(tmp_path):
    with Run(tmp_path) as run:
        run.begin("start", 0)
        run.train(10, 60)
        expected = logged(tmp_path)
        assert scalars(seen(tmp_path)) == expected  # while it goes on
        run.write("end", step=60, trained_s=60.0)
    assert scalars(seen(tmp_path)) == by_order(tmp_path) == expected
    assert {name.split("/")[0]: len(points) for name, points in expected.items()} == {
        "training": 6, "validation": 2, "checkpoints": 2}
    assert len(expected) == 7 + 5 + 2 and len(set(expected["training/loss"])) == 6


@pytest.mark.parametrize("step, validates", [(30, True), (30, False), (60, True), (0, False), (20, False)])
def test_what_is_done_again_counts_once_and_a_cut_file_does_no_harm(tmp_path, monkeypatch, step, validates):
    with Run(tmp_path) as run:
        run.begin("start", 0)
        run.train(10, 80)
    (first,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(first, first.stat().st_size - 5)  # a kill cuts the last event short
    monkeypatch.setattr("launch.board.time.time", lambda: 0.0)  # a clock that was set back
    for _ in range(2):  # the second time from the same checkpoint
        with Run(tmp_path) as run:
            run.begin("resume", step, validates=validates)
            if validates:
                run.write("epoch", epoch=step // 30, step=step, val={"top1": 0.875, "top5": 0.25, "images": 50},
                          validation_s=2.0, trained_s=7.0)
            run.train(step + 10, 70)
    expected = logged(tmp_path)
    assert scalars(seen(tmp_path)) == by_order(tmp_path) == expected
    assert [at for at, _ in expected["training/loss"]] == list(range(10, 71, 10))
    assert [at for at, _ in expected["validation/top1"]] == [30, 60]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


def test_a_point_between_the_checkpoint_and_the_next_point_is_forgotten(tmp_path):
    with Run(tmp_path) as run:
        run.begin("start", 0)
        run.train(10, 30)
        run.write("steps", step=34, loss=99.0)  # where it was told to stop; the checkpoint was removed
    with Run(tmp_path) as run:
        run.begin("resume", 30, validates=False)
    assert scalars(seen(tmp_path)) == by_order(tmp_path) == logged(tmp_path)
    assert [at for at, _ in by_order(tmp_path)["training/loss"]] == [10, 20, 30]


def test_command_and_recipe_are_read_as_tables(tmp_path):
    with Run(tmp_path) as run:
        run.begin("start", 0)
        run.write("failed", step=7, reason="the loss is NaN")
    texts = {tag: seen(tmp_path).Tensors(tag)[0].tensor_proto.string_val[0].decode().splitlines()
             for tag in ("run/command", "run/recipe", "run/failed")}
    assert {r"| command | alexnet train a\|b run |", "| commit | none |"} <= set(texts["run/command"])
    assert "| batch | 32 | images a step |" in texts["run/recipe"] and len(texts["run/recipe"]) == 2 + len(meanings())
    assert texts["run/failed"][-1] == "| the loss is NaN |"
    assert not any("n01" in line for lines in texts.values() for line in lines)  # a thousand classes are no table


def shown(read: EventAccumulator, tag: str) -> list[tuple[int, np.ndarray]]:
    return [(event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))) for event in read.Images(tag)]


def test_pictures_are_whole(tmp_path):
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (2, 7, 9, 3), np.uint8)
    kernels = torch.from_numpy(random.standard_normal((24, 3, 11, 11)).astype(np.float32))
    with Board(tmp_path) as board:
        for step in (0, 5):
            board.picture("a/b", pictures[step // 5], step)
        board.kernels(kernels, 12, 5)
    read = seen(tmp_path)
    assert [(event.step, event.width, event.height) for event in read.Images("a/b")] == [(0, 9, 7), (5, 9, 7)]
    for (_, picture), expected in zip(shown(read, "a/b"), pictures):
        np.testing.assert_array_equal(picture, expected)
    for tower in (0, 1):
        ((step, picture),) = shown(read, f"conv1/tower {tower}")
        assert step == 5
        np.testing.assert_array_equal(picture, kernel_grid(kernels[12 * tower : 12 * tower + 12].numpy()))


def test_kernels_reach_from_black_to_white():
    random = np.random.default_rng(0)
    kernels = random.standard_normal((20, 3, 5, 5)) * np.arange(20).reshape(-1, 1, 1, 1) + 7
    grid = kernel_grid(kernels)
    side = (grid.shape[1] + GAP) // 16 - GAP  # of an enlarged kernel; 16 beside each other
    assert grid.shape == (2 * (side + GAP) - GAP, 16 * (side + GAP) - GAP, 3) and side % 5 == 0
    enlarged = side // 5
    for place, kernel in enumerate(kernels):
        top, left = place // 16 * (side + GAP), place % 16 * (side + GAP)
        cell = grid[top : top + side, left : left + side].reshape(5, enlarged, 5, enlarged, 3)
        assert (cell == cell[:, :1, :, :1]).all()
        expected = np.full_like(kernel, 0.5) if place == 0 else (kernel - kernel.min()) / np.ptp(kernel)
        np.testing.assert_allclose(cell[:, 0, :, 0].transpose(2, 0, 1) / 255, expected, atol=0.51 / 255)
    assert (grid[side + GAP :, 4 * (side + GAP) - GAP :] == 255).all()  # of the last row, where there are none


@pytest.mark.parametrize("mean_at", ["crop", "centre"])
@pytest.mark.parametrize("noise", [True, False])
def test_crops_are_those_of_the_images(tmp_path, mean_at, noise):
    """In pixels 100 to 150, which colour noise leaves between black and white."""
    random = np.random.default_rng(1)
    images = random.integers(100, 151, (10, 256, 256, 3), np.uint8)
    mean = random.uniform(0, 255, (256, 256, 3)).astype(np.float32)
    lighting = Lighting.from_covariance(np.diag([9000.0, 8000.0, 7000.0])) if noise else None
    batch = TrainingBatches(10, 10, 3, lighting, mean_at=mean_at).at(0, 0)
    pixels = Finisher(mean, 1 / 64, 224, 1).finish(images[batch.indices], batch).permute(0, 3, 1, 2)
    before = pixels.clone()
    grid = crop_grid(pixels, batch, mean, 1 / 64)
    assert torch.equal(pixels, before)  # the network gets what it would have got
    assert grid.shape == (2 * 224 + GAP, 4 * 224 + 3 * GAP, 3) and len(set(batch.flips[:8])) == 2
    for place in range(8):
        (y, x), top, left = batch.anchors[place], place // 4 * (224 + GAP), place % 4 * (224 + GAP)
        crop = images[batch.indices[place], y : y + 224, x : x + 224].astype(np.float32)
        expected = (crop[:, ::-1] if batch.flips[place] else crop) + batch.shifts[place]
        np.testing.assert_allclose(grid[top : top + 224, left : left + 224], expected, atol=0.51)
    assert noise == bool(batch.shifts.any())


def use(board: Board) -> None:
    """All that a training does with it."""
    board.record("start", {"step": 0, "recipe": TINY.to_dict()})
    board.record("steps", {"step": 1, "loss": 1.0})
    board.picture("a", np.zeros((4, 4, 3), np.uint8), 0)
    board.kernels(torch.zeros(4, 3, 5, 5), 2, 1)
    board.crops(torch.zeros(8, 3, 224, 224), TrainingBatches(8, 8, 0, None).at(0, 0),
                np.zeros((256, 256, 3), np.float32), 1.0, 0)
    board.close()


def told(capfd) -> str:
    """The one line on stderr."""
    output, line = capfd.readouterr()
    assert output == "" and line.count("\n") == 1 and line.startswith("alexnet: nothing more for TensorBoard: ")
    assert line.endswith("; the training goes on\n")
    return line


def test_a_folder_that_cannot_be_written(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("a file of this name")
    use(Board(tmp_path))
    assert f"{tmp_path / 'tensorboard'}: File exists" in told(capfd)


def test_tensorboard_is_not_installed(tmp_path, monkeypatch, capfd):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    use(Board(tmp_path))
    assert "tensorboard is not installed (pip install tensorboard)" in told(capfd)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, capfd):
    """Ends the board in the middle of a picture; what was written before is read."""
    board = Board(tmp_path)
    for step in range(1, 4):
        board.record("steps", {"step": step, "loss": 0.5})
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        board.picture("a", noise, 4)
        board.record("steps", {"step": 5, "loss": 0.5})
        board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path / 'tensorboard'}: File too large" in told(capfd)
    assert scalars(seen(tmp_path)) == {"training/loss": [(1, 0.5), (2, 0.5), (3, 0.5)]}


def test_a_record_that_is_odd(tmp_path, capfd):
    board = Board(tmp_path)
    board.record("steps", {"loss": 1.0})
    use(board)
    assert "KeyError: 'step'" in told(capfd)


def test_who_does_not_lead_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with Board(None) as board:
        use(board)
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("module", ["launch.cli", "launch.board"])
def test_only_a_board_that_writes_imports_tensorboard(module):
    code = f"import sys, {module}; sys.exit(any(name.split('.')[0] == 'tensorboard' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
