"""Being asked to end: SIGTERM, from a scheduler that wants the machine back, or from torchrun, which passes it on."""

from __future__ import annotations

import signal
import threading
from types import TracebackType

from model.errors import PeerError


class StopRequest:
    """While it is open, the first SIGTERM only sets `made`; a second one ends the process at once, as ever."""

    def __init__(self):
        self.made = False

    def _ask(self, number: int, frame: object) -> None:
        self.made = True
        signal.signal(signal.SIGTERM, self._before)

    def __enter__(self) -> StopRequest:
        self._here = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
        if self._here:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._here:
            signal.signal(signal.SIGTERM, self._before)
            if self.made and isinstance(error, PeerError):  # it cannot end in good order, and has nothing to tell
                signal.raise_signal(signal.SIGTERM)
