"""Being asked to end: SIGTERM, from a scheduler that wants the machine back, or from torchrun, which passes it on."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType

from launch.errors import Stopped
from model.errors import PeerError


IMPATIENT_S = 5.0  # a scheduler may signal every process, and torchrun passes its own signal on: that is one request


class StopRequest:
    """While it is open, SIGTERM only sets `made`; one that comes some seconds later ends the process, as ever."""

    def __init__(self):
        self.made = False

    def _ask(self, number: int, frame: object) -> None:
        if not self.made:
            self.made, self._asked = True, time.monotonic()
        elif time.monotonic() - self._asked > IMPATIENT_S:
            signal.signal(signal.SIGTERM, self._before)
            signal.raise_signal(signal.SIGTERM)

    def __enter__(self) -> StopRequest:
        self._here = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
        if self._here:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._here:
            signal.signal(signal.SIGTERM, self._before)
            # It cannot end in good order, and has nothing to tell: others died first, or the first process tells it.
            if self.made and (isinstance(error, PeerError) or isinstance(error, Exception)
                              and not isinstance(error, Stopped) and os.environ.get("LOCAL_RANK", "0") != "0"):
                signal.raise_signal(signal.SIGTERM)
