"""The first-token edit of one eager decoding step, for calls that wait for the host rather than for the device.

With one query a row, attention on a GPU takes less time than Python needs to launch it. :func:`merge_step` does what
:func:`headpatch.kernels.first_token.merge_first_token` does for this one case (no mask, no window, no sink, key 0 first), by a kernel
that is compiled once per shape and dtype, whatever strides and lengths it meets, and then launched without Triton's argument
analysis: that alone is 40 us a layer with the general kernel's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headpatch.kernels.first_token import tile, triton_available
from headpatch.kernels.launch import compiled

__all__ = ["can_merge_step", "merge_step"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_launchers: dict[tuple[Any, ...], Callable[..., None]] = {}
"""Compiled kernels by device, dtypes and shape; nothing of a model is in them."""


def can_merge_step(q: Tensor) -> bool:
    """Whether :func:`merge_step` runs where `q` lies; not under a compiler, which inlines the general kernel."""
    return q.is_cuda and q.dtype in _DTYPES and triton_available(q.device) and not torch.compiler.is_compiling()


def merge_step(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, gamma: Tensor, scale: float, complement: bool,
    head_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Change the first key's share in `o`, in place, and scale the heads.

    Parameters
    ----------
    q
        [b, H, 1, d], CUDA; last stride 1, as for k, v and o.
    k, v
        [b, K, n, d] and [b, K, n, dv]: all keys and values; key 0 is the first token of every row.
    o
        [b, H, 1, dv] attention output, over all keys or (`complement`) all but key 0; overwritten.
    lse
        [b, H, 1] fp32, its log-sum-exp; heads side by side.
    gamma, head_scale
        [H] fp32, contiguous; `head_scale` None for ones.
    scale
        Softmax scale.

    Returns
    -------
    Tensor
        [b, 1, H, dv], a view of `o`.
    """
    b, heads, _, d = q.shape
    kv, dv = k.shape[1], o.shape[3]
    (q_b, q_h, _, _), (k_b, k_h, _, _), (v_b, v_h, _, _), (o_b, o_h, _, _) = (
        q.stride(),
        k.stride(),
        v.stride(),
        o.stride(),
    )
    args = (q, k, v, o, lse, gamma, head_scale, q_b, q_h, k_b, k_h, v_b, v_h, o_b, o_h, lse.stride(0), scale)
    index = q.device.index
    key = (index, b, q.dtype, o.dtype, k.dtype, heads, kv, d, dv, complement, head_scale is None)
    found = _launchers.get(key)
    if found is None:
        with torch.cuda.device(q.device):
            found = _launchers[key] = _compile(key, args)
    if index == torch.cuda.current_device():
        found(*args)
    else:
        with torch.cuda.device(q.device):
            found(*args)
    return o.transpose(1, 2)


def _compile(key: tuple[Any, ...], args: tuple[Any, ...]) -> Callable[..., None]:
    from headpatch.kernels._triton import step

    _, b, _, _, _, heads, kv, d, dv, complement, _ = key
    head_blocks, gb, _, dp, dvp, warps = tile(heads, kv, d, dv, False)
    shape = {"KH": kv, "G": heads // kv, "D": d, "DV": dv, "DP": dp, "DVP": dvp, "GB": gb, "COMPLEMENT": complement}
    grid = (kv * head_blocks, b, 1)
    run = compiled(step, grid, args, shape, {"num_warps": warps})
    return lambda *a: run(grid, a)
