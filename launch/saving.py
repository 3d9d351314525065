"""When a run's checkpoints are waited for, what is said of them, and how long it goes on without any."""

from __future__ import annotations

import sys

from torch import Tensor
from tqdm import tqdm

from launch.checkpoint_writer import CheckpointWriter, NotWritten
from launch.environment import tell_checkpoint
from launch.runlog import RunLog

NOT_WRITTEN = 3  # checkpoints in a row after which a run that cannot write them ends


class Saving:
    """Of a run that goes on meanwhile: all its processes call `begin` and `settle` alike."""

    def __init__(self, writer: CheckpointWriter, log: RunLog, tells: bool):
        self._writer, self._log, self._tells = writer, log, tells
        self._not_written = 0  # since the last good one

    def begin(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        """Begin a checkpoint, after the one before is whole."""
        self.settle(step)
        self._writer.begin(step, tensors, state)

    def settle(self, step: int, last: bool = False) -> None:
        """Wait for the checkpoint that is being written. Without it the training goes on, but not for ever: a full disk
        may have been seen to when the next one is written. Raises NotWritten after several, or for the `last`."""
        try:
            self._writer.finish()
        except NotWritten as error:
            self._not_written += 1
            self._log.write("not written", step=step, reason=str(error))
            if last or self._not_written == NOT_WRITTEN:
                raise
            if self._tells:
                tqdm.write(f"alexnet: {error} (or wait: the training goes on, and so it does with the next checkpoint)",
                           file=sys.stderr)
        self.tell()

    def tell(self) -> None:
        """Log the checkpoint that has become whole, if one has."""
        written = self._writer.written()
        if written is not None:
            tell_checkpoint()
            self._not_written = 0
            self._log.write("checkpoint", step=written.step, path="/".join(written.path.parts[-2:]),
                            held_s=round(written.held_s, 3), seconds=round(written.seconds, 3))
