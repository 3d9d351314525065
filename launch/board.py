"""A run's figures and pictures for TensorBoard: event files in RUN/tensorboard/, beside the log."""

from __future__ import annotations

import functools
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from launch.recipe_text import shown
from launch.runlog import of_the_run, read_log
from model.errors import reason
from model.recipe import meanings
from pipeline.batches import Batch

# Of these records every number becomes a scalar, by its name in the log.
GROUPS = {"steps": "training", "epoch": "validation", "checkpoint": "checkpoints"}
COLUMNS = 16  # kernels beside each other, as in figure 3
ENLARGED = 6  # a kernel's pixels, both ways
CROPS = (2, 4)  # rows and columns
GAP = 4  # pixels between pictures


def _stops_nothing(method: Callable[..., None]) -> Callable[..., None]:
    """Whatever goes wrong in a Board's method is one line on stderr, and the board's end."""

    @functools.wraps(method)
    def guarded(board: Board, *arguments) -> None:
        if not board.writes:
            return
        try:
            method(board, *arguments)
        except Exception as error:  # of any kind: the training is worth more
            board.close()
            if isinstance(error, ModuleNotFoundError):
                why = f"{(error.name or 'it').split('.')[0]} is not installed (pip install tensorboard)"
            elif isinstance(error, OSError) and error.strerror:
                why = f"{board.folder}: {error.strerror}"
            else:
                why = f"{type(error).__name__}: {reason(error)}"
            tqdm.write(f"alexnet: nothing more for TensorBoard: {why}; the training goes on", file=sys.stderr)

    return guarded


class Board:
    """Writes what the log is told, and pictures. Only rank 0 holds one that does; `Board(None)` keeps nothing.

    It writes at once and without a thread, unlike torch's SummaryWriter: a record is one event and not ten, and what a
    full disk raises is raised here.
    """

    def __init__(self, run: Path | None):
        """`run` is the run's folder, with its log."""
        self.writes, self._file = run is not None, None
        if run is not None:
            self.folder, self._log_path = run / "tensorboard", run / "log.jsonl"
        self._open()

    @_stops_nothing
    def _open(self) -> None:
        # Here and not above: it takes 0.2 s, and a training goes on without.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        # Readers take files by their names, so that these count, whatever the clock says. One that a kill has cut short
        # is never gone on with: of it only the last event is lost.
        names = [re.search(r"tfevents\.(\d+)", path.name) for path in self.folder.iterdir()]
        number = 1 + max([int(name[1]) for name in names if name], default=0)
        self._file = open(self.folder / f"events.out.tfevents.{number:010d}", "xb")
        self._writer = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))

    @_stops_nothing
    def record(self, event: str, fields: dict) -> None:
        """Write a record that the log has just been given, as far as it is to be seen here."""
        if event in ("start", "resume"):
            self._go_on_from(fields["step"])
            facts = [(name, shown(value)) for name, value in fields.items() if name not in ("recipe", "wnids")]
            self._text("run/command", facts, fields["step"])
            self._text("run/recipe", [(name, shown(fields["recipe"][name]), meaning)
                                      for name, meaning in meanings().items()], fields["step"])
        elif event in GROUPS:
            self._summary(fields["step"], [{"tag": f"{GROUPS[event]}/{name}", "simple_value": number}
                                           for name, number in _numbers(fields) if name not in ("step", "epoch")])
        elif event == "failed":
            self._text("run/failed", [(fields["reason"],)], fields["step"])

    @_stops_nothing
    def kernels(self, weight: Tensor, of_a_tower: int, step: int) -> None:
        """Show conv1's kernels float [K, 3, h, w], of one tower or more, in a picture each; so many are a tower's."""
        for number, part in enumerate(weight.detach().float().cpu().split(of_a_tower)):
            self.picture(f"conv1/tower {number}", kernel_grid(part.numpy()), step)

    @_stops_nothing
    def crops(self, pixels: Tensor, batch: Batch, mean: np.ndarray, scale: float, step: int) -> None:
        """Show the first of a batch's pixels [N, 3, h, w] as `crop_grid` has them."""
        self.picture("input/crops", crop_grid(pixels, batch, mean, scale), step)

    @_stops_nothing
    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Show uint8 [H, W, 3]."""
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        height, width, _ = pixels.shape
        self._summary(step, [{"tag": name, "image": {"height": height, "width": width, "colorspace": 3,
                                                     "encoded_image_string": png.getvalue()}}])

    def close(self) -> None:
        self.writes = False
        if self._file:
            with suppress(OSError):  # after a full disk
                self._file.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _go_on_from(self, step: int) -> None:
        """Have readers forget what files before this one say of `step` and later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # A folder's first START is no restart to them, wherever it comes: a new run needs one too, or the next is none.
        self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        # TensorBoard's own server does not look at it: there a point makes later ones of its name forgotten.
        records = read_log(self._log_path)
        for event in GROUPS:
            for record in of_the_run(records, event):
                if record["step"] == step:
                    self.record(event, record)

    def _text(self, name: str, rows: list[tuple[str, ...]], step: int) -> None:
        """Write a Markdown table. Its headings, without which it would be none, are empty."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        width = len(rows[0])
        lines = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
        text = "\n".join(["| " * width + "|", "|---" * width + "|", *(f"| {line} |" for line in lines)])
        self._summary(step, text_pb(name, text).value)

    def _summary(self, step: int, values: list) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if values:
            self._write(Event(step=step, summary={"value": values}))

    def _write(self, event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._file.flush()


def kernel_grid(kernels: np.ndarray) -> np.ndarray:
    """Return uint8 [H, W, 3] of kernels float [K, 3, h, w] in RGB, each from its least to its greatest number."""
    low, high = (extreme(kernels, (1, 2, 3), keepdims=True) for extreme in (np.min, np.max))
    grey = np.full_like(kernels, 0.5)  # where a kernel's numbers are all the same
    levels = np.divide(kernels - low, high - low, out=grey, where=high > low)
    enlarged = (255 * levels).round().astype(np.uint8).repeat(ENLARGED, 2).repeat(ENLARGED, 3)
    return _grid(enlarged.transpose(0, 2, 3, 1), min(COLUMNS, len(kernels)))


def crop_grid(pixels: Tensor, batch: Batch, mean: np.ndarray, scale: float) -> np.ndarray:
    """Return uint8 [H, W, 3] of the first crops of `batch` as the network sees them, colour noise too.

    `pixels` are float [N, 3, h, w]: the crops less `mean` (float32 [256, 256, 3]), times `scale`.
    """
    rows, columns = CROPS
    seen = pixels[: rows * columns].float().cpu().permute(0, 2, 3, 1).numpy() / scale
    height, width = seen.shape[1:3]
    for crop, (y, x), flipped in zip(seen, batch.mean_anchors, batch.mean_flips):
        below = mean[y : y + height, x : x + width]
        crop += below[:, ::-1] if flipped else below
    return _grid(seen.round().clip(0, 255).astype(np.uint8), min(columns, len(seen)))


def _grid(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Lay uint8 [N, h, w, 3] out in rows, on white."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // columns * (height + GAP), place % columns * (width + GAP)
        grid[top : top + height, left : left + width] = picture
    return grid


def _numbers(fields: dict) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record, also those of the objects in it."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value
