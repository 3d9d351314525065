"""The compiled kernels of model.cpu_kernels and model.gpu_kernels, where Numba and Triton are there for them, and how
the former run on torch's threads."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
from torch import Tensor


logger = logging.getLogger(__name__)


@functools.cache
def compiled_kernels() -> ModuleType | None:
    """Return model.cpu_kernels, or None where there is no Numba."""
    try:
        from model import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels


def gpu_kernels_for(x: Tensor) -> ModuleType | None:
    """Return model.gpu_kernels where x is on a GPU and of a type that they take."""
    return gpu_kernels() if x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) else None


@functools.cache
def gpu_kernels() -> ModuleType | None:
    """Return model.gpu_kernels, or None, with a warning, where there is no Triton or no C compiler for it."""
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        logger.warning("no C compiler (gcc): training is slow on this GPU")
        return None
    try:
        from model import gpu_kernels
    except ImportError:
        logger.warning("no Triton: training is slow on this GPU")
        return None
    return gpu_kernels


def on_all_threads(kernel: Callable, tensors: tuple[Tensor, ...], *settings) -> None:
    """Run `kernel(*arrays, *settings)` on CPU tensors of one length, an equal part on each of torch's threads.

    A bfloat16 tensor's array is uint16: its bits.
    """
    arrays = [(t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).detach().numpy() for t in tensors]
    threads, length = torch.get_num_threads(), len(arrays[0])
    cuts = [length * i // threads for i in range(threads + 1)]
    own, *others = ([array[first:last] for array in arrays] for first, last in zip(cuts, cuts[1:]))
    pending = [_pool(threads - 1).submit(kernel, *part, *settings) for part in others]
    kernel(*own, *settings)
    for part in pending:
        part.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "kernels")
