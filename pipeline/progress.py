"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, "int | None", str], object]  # (done, expected or None if nobody knows, what is being done)
