"""Numba as this project uses it."""

from __future__ import annotations

from collections.abc import Callable

import numba


def compiled(function: Callable | None = None, **options) -> Callable:
    """Machine code, made at the first call and kept for later processes where a folder for it can be written (beside
    the function's file, or the user's cache). It holds no lock of Python's, so threads run it side by side."""
    if function is None:
        return lambda function: compiled(function, **options)
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(nogil=True, **options)(function)
