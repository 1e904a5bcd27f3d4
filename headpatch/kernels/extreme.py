"""Which tokens of a residual stream are extreme in some dimensions: massive activations, the mark of attention sinks.

    max over d of |x_d|  >=  threshold * sqrt(mean of x^2 + 1e-6)

in at least fp32. One launch on CUDA with Triton, plain torch elsewhere.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from headpatch.kernels.first_token import triton_available
from headpatch.kernels.launch import launch

__all__ = ["extreme"]

EPSILON = 1e-6


def extreme(x: Tensor, dims: Tensor, threshold: float, backend: str | None = None) -> Tensor:
    """[b, n] bool of x [b, n, D], for dims int64 [e]; `backend` "triton" or "torch", None picks."""
    width = x.shape[-1]
    if backend is None:
        fused = triton_available(x.device) and x.dtype != torch.float64 and not torch.compiler.is_compiling()
        backend = "triton" if fused and x.stride(-1) == 1 else "torch"
    if backend == "triton":
        found = torch.empty(x.shape[:2], dtype=torch.bool, device=x.device)
        constants = {"W": width, "COUNT": len(dims), "BLOCK": min(4096, 1 << (width - 1).bit_length())}
        args = (
            x, dims, found, x.stride(0), x.stride(1), x.shape[1], threshold * threshold / width,
            threshold * threshold * EPSILON,
        )  # fmt: skip
        aligned = not (x.data_ptr() & 15)
        launch(_kernel(), x.device, (x.dtype, width, len(dims), aligned), (found.numel(), 1, 1), args, constants)
        return found
    dtype, norm = torch.promote_types(x.dtype, torch.float32), torch.linalg.vector_norm
    # No copy of the stream in another dtype, and few calls.
    peak = norm(x.index_select(-1, dims), math.inf, -1, dtype=dtype)
    floor = torch.full((), threshold * EPSILON**0.5, dtype=dtype, device=x.device)
    return peak >= torch.hypot(norm(x, 2, -1, dtype=dtype) * (threshold / width**0.5), floor)


@functools.cache
def _kernel() -> Any:
    from headpatch.kernels import _triton_segments

    return _triton_segments.extreme
