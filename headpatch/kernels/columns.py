"""Attention that each key of a causal prompt receives, summed over queries: two launches, and no map in memory."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from headpatch.kernels.launch import launch
from headpatch.kernels.segments import outer, padded

__all__ = ["block", "column_sums"]


def column_sums(q: Tensor, k: Tensor, counted: Tensor, scale: float, heads: Tensor | None = None) -> Tensor:
    """Attention received by keys, from those queries that count.

    Parameters
    ----------
    q
        [b, H, q, d], where :func:`headpatch.kernels.segments.takes` holds; the queries are the last of the keys' tokens, and see
        what is not behind them.
    k
        [b, K, n, d], K a divisor of H.
    counted
        [b, q] bool.
    scale
        Softmax scale.
    heads
        int64 [h] query heads to look at; None for all.

    Returns
    -------
    Tensor
        [b, H or h, n] fp32.
    """
    b, total, n_q, d = q.shape
    n_k = k.shape[2]
    count = total if heads is None else len(heads)
    lse = torch.empty(b, count, n_q, dtype=torch.float32, device=q.device)
    sums = torch.empty(b, count, n_k, dtype=torch.float32, device=q.device)
    counted = counted if counted.stride(-1) == 1 else counted.contiguous()
    wide = padded(d)
    size = block(wide)
    constants = {
        "G": total // k.shape[1], "D": d, "DP": wide, "BM": size, "BN": size, "EXACT": q.dtype == torch.float32,
    }  # fmt: skip
    key = (q.dtype, constants["G"], d, heads is None)
    places, numbers = (*outer(q), *outer(k)), (count, n_q, n_k, scale * math.log2(math.e))
    kernels = _kernels()
    launch(
        kernels.rows, q.device, key, (-(-n_q // size), b * count, 1), (q, k, heads, lse, *places, *numbers), constants
    )
    c_b = counted.stride(0) if b > 1 else 0
    args = (q, k, heads, lse, counted, sums, *places, c_b, *numbers)
    launch(kernels.columns, q.device, key, (-(-n_k // size), b * count, 1), args, constants)
    return sums


def block(wide: int) -> int:
    """Queries and keys that a program has before it at a time, at this width: small, for few heads are to keep a GPU busy."""
    return 64 if wide <= 128 else 32


@functools.cache
def _kernels() -> Any:
    from headpatch.kernels import _triton_columns

    return _triton_columns
