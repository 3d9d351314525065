"""Kernels for a GPU, in Triton, each one pass over its memory. All tensors of a call lie on one device."""

from model.gpu_kernels.elementwise import bias_relu, column_sums, momentum_update, space_to_depth
from model.gpu_kernels.normalisation import (
    normalise,
    normalise_and_pool,
    normalise_and_pool_backward,
    normalise_backward,
)

__all__ = ["bias_relu", "column_sums", "momentum_update", "normalise", "normalise_and_pool",
           "normalise_and_pool_backward", "normalise_backward", "space_to_depth"]
